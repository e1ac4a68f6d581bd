"""What `qi2 launch` prints and applies: one text, and the command that reads it from its standard input."""

import dataclasses
import shutil
import subprocess
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job in the language of its cluster.

    Attributes:
      text: manifests in YAML, or a shell script; valid input of `command` as it is printed.
      command: command that applies it, which reads the text from its standard input.
      needs: programs that must be installed, each with the way to install it.
    """

    text: str
    command: tuple[str, ...]
    needs: tuple[tuple[str, str], ...]

    def apply(self) -> None:
        """Runs the command.

        Raises:
          ValueError: if a program is missing, or the command fails.
        """
        for program, hint in self.needs:
            if shutil.which(program) is None:
                raise ValueError(
                    f"{program} is not installed here: {hint}. Or save the text with --dry-run and apply it elsewhere "
                    f"with: {' '.join(self.command)}"
                )
        done = subprocess.run(self.command, input=self.text, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{' '.join(self.command)} failed with status {done.returncode}; its output is above")


def commented(lines: Iterable[str]) -> str:
    """Lines as comments of YAML and of shell scripts. A line break within a line cannot end the comment."""
    return "".join(f"# {' '.join(line.split())}\n" if line else "#\n" for line in lines)
