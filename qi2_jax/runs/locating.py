"""The layout of a run, and the meaning of a path given by the user.

RUN/config.json  metrics.jsonl       configuration and metrics
RUN/model/                           a model folder (`qi2_jax.interop.folder`); trained weights are in the checkpoints
                                     (a LoRA run has the adapter there and the adapted transformer here)
RUN/start_lora/                      for a LoRA run that started from another LoRA run: the adapter that was merged into
                                     the transformer, as `qi2 export --lora` writes it
RUN/checkpoints/STEP/                see `qi2_jax.training.checkpoints.manager`
JOB/job.json  JOB/transformer/       a job (`qi2_jax.workflows.demo`) and its run
DIR/curriculum.json  DIR/stages/NAME/transformer/
                                     a curriculum (`qi2_jax.workflows.curriculum`) and the runs of its stages
"""

import dataclasses
import pathlib

import numpy as np

from qi2_jax.interop import components, files, folder, stored_weights
from qi2_jax.interop.lora import merging, reading, writing
from qi2_jax.interop.lora.merging import Changes
from qi2_jax.interop.stored_weights import Weights
from qi2_jax.interop.tensor_names import Shapes
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.runs.paths import CHECKPOINTS, CONFIG, JOB, MODEL, START_LORA, run_of
from qi2_jax.training.checkpoints import checksums, contents
from qi2_jax.training.checkpoints.files import steps


@dataclasses.dataclass(frozen=True)
class Located:
    """A model folder and, for a run, the checkpoint whose transformer replaces the folder's.

    Attributes:
      lora: configuration of the adapter if the checkpoint contains one; it adapts the folder's transformer.
    """

    model: pathlib.Path
    checkpoint: pathlib.Path | None = None
    lora: LoRAConfig | None = None

    def weights(self, name: str, item: str = "ema") -> Weights:
        """Weights of a component, with the adapter merged; `item` is "ema" or "model" (raw weights) of a checkpoint.

        Raises:
          ValueError: if they are missing or do not match the component's configuration.
        """
        expected = components.COMPONENTS[name].expected(components.read_config(self.model / name, name))
        if name == "transformer" and self.checkpoint is not None and self.lora is None:
            return self._trained(expected, item)
        stored = stored_weights.open_ours(self.model / name, expected)[0]
        if name == "transformer" and self.lora is not None:
            return merging.merged(stored, merging.changes_of(self.adapter(item)[1], self.lora))
        return stored

    def check(self) -> None:
        """Compares the checkpoint's files with their checksums; call this before its weights are copied.

        Raises:
          ValueError: if it is damaged, naming what is wrong.
        """
        if self.checkpoint is not None and (wrong := checksums.problems(self.checkpoint)):
            raise ValueError(
                f"checkpoint {self.checkpoint} is damaged: {'; '.join(wrong)}. Name an earlier one, or continue its "
                "run, which resumes from the checkpoint before"
            )

    def adapter(self, item: str = "ema") -> tuple[LoRAConfig, dict[str, np.ndarray]]:
        """Configuration and leaves {our name: array} of a LoRA run's adapter, in memory.

        Raises:
          ValueError: if this is not a LoRA run, or the checkpoint does not match its configuration.
        """
        if self.lora is None:
            raise ValueError(
                f"{self.checkpoint or self.model} has no adapter; only runs with lora.rank above 0 have one"
            )
        base_config = components.read_config(self.model / "transformer", "transformer")
        found = self._trained(writing.expected(base_config, self.lora), item)
        return self.lora, {name: weight.read() for name, weight in found.items()}

    def start_lora(self) -> Changes | None:
        """The adapter that was merged into the transformer which a LoRA run adapts; None if there was none.

        Raises:
          ValueError: if it was not kept, because an earlier version of qi2 began the run.
        """
        run = self.model.parent
        if self.lacks_start_lora():
            raise ValueError(
                f"{run} began with the merged weights of a LoRA run, whose adapter an earlier version of qi2 did not "
                "keep: the adapter of this run alone does not fit the published model. Export the whole model, without "
                "--lora"
            )
        if not (run / START_LORA).is_dir():
            return None
        return reading.read(run / START_LORA, components.read_config(self.model / "transformer", "transformer"))

    def lacks_start_lora(self) -> bool:
        """Whether a LoRA run began with a LoRA run whose adapter was not kept, as earlier versions of qi2 did."""
        run = self.model.parent
        return not (run / START_LORA).is_dir() and _began_with_a_lora_run(run)

    def changes(self, item: str = "ema") -> Changes:
        """All changes of a LoRA run against the transformer that its first LoRA run adapted, as one adapter.

        Raises:
          ValueError: as `adapter` and `start_lora`.
        """
        config, leaves = self.adapter(item)
        return merging.concatenated([self.start_lora() or {}, merging.changes_of(leaves, config)])

    def _trained(self, expected: Shapes, item: str) -> Weights:
        assert self.checkpoint is not None
        found = contents.weights(self.checkpoint, item)
        stored_weights.check_ours(
            {name: weight.shape for name, weight in found.items()}, expected, str(self.checkpoint)
        )
        return found


def model_of(path: pathlib.Path) -> pathlib.Path:
    """The model folder of a job or a run; any other path is returned unchanged."""
    path = run_of(path)
    return path / MODEL if (path / MODEL).is_dir() else path


def lora_of(run: pathlib.Path) -> LoRAConfig | None:
    """The configuration of the adapter that a run trains; None if it trains the whole model.

    Raises:
      ValueError: if the group `lora` of the run's configuration is invalid.
    """
    path = run / CONFIG
    group = files.read_json(path).get("lora") if path.is_file() else None
    try:
        return LoRAConfig(group["rank"], group["alpha"], tuple(group["targets"])) if group and group["rank"] else None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def _began_with_a_lora_run(run: pathlib.Path) -> bool:
    """Whether the run, checkpoint or folder that a run's configuration names as its start is still there, and LoRA."""
    start = files.read_json(run / CONFIG).get("start") if (run / CONFIG).is_file() else None
    folder_of_start = start.get("folder") if isinstance(start, dict) else None
    try:
        return bool(folder_of_start) and locate(str(folder_of_start)).lora is not None
    except ValueError:
        return False


def locate(path: pathlib.Path | str, item: str = "ema") -> Located:
    """Locates the model in a run (its newest checkpoint), a job, a checkpoint, or an imported folder.

    Raises:
      ValueError: if the path is none of these, or if `item` asks for raw weights of a folder with a single set of
        weights.
    """
    path = run_of(pathlib.Path(path).absolute())
    if (path / folder.MARK).is_file():
        if item != "ema":
            raise ValueError(f"{path} has a single set of weights, unlike a run: omit --weights {item}")
        return Located(path)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if (run / MODEL / folder.MARK).is_file():
        saved = steps(run / CHECKPOINTS)
        if run != path:
            if path.name not in map(str, saved):
                raise ValueError(f"{path} is not a complete checkpoint; {run} has those of the steps {saved}")
            return Located(run / MODEL, path, lora_of(run))
        if not saved:
            raise ValueError(f"{run} has no complete checkpoint in {run / CHECKPOINTS}")
        return Located(run / MODEL, run / CHECKPOINTS / str(saved[-1]), lora_of(run))
    if reading.is_adapter(path):
        raise ValueError(
            f"{path} is an adapter, not a model; name the model here, and the adapter with `qi2 sample --lora` or "
            "`qi2 train --start`"
        )
    raise ValueError(
        f"{path} is neither a run ({MODEL}/{folder.MARK}) or job ({JOB}), nor a checkpoint of one, nor an imported "
        f"folder ({folder.MARK}); `qi2 import` turns a published pipeline folder of diffusers into one"
    )
