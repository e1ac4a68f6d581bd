"""When a training run saves its state."""

import dataclasses
import enum


class Save(enum.Enum):
    """The destination of a save."""

    PERSISTENT = "persistent"
    LOCAL = "local"  # on each host's disk


@dataclasses.dataclass(frozen=True)
class SaveSchedule:
    """The steps that are saved.

    Attributes:
      every: interval of persistent checkpoints, in steps.
      local_every: interval of local checkpoints between them, in steps; 0: none.
    """

    every: int
    local_every: int = 0

    def due(self, step: int, *, last: bool) -> Save | None:
        """The save that is due after `step`; the last step is always saved persistently."""
        if last or step % self.every == 0:
            return Save.PERSISTENT
        return Save.LOCAL if self.local_every and step % self.local_every == 0 else None
