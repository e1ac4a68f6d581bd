"""Where things stand in the folder of a run, and what a path given by the user means.

RUN/config.json  metrics.jsonl       what was run and how it went
RUN/model/                           a model folder (`qi2_jax.interop.folder`); trained weights are in checkpoints
RUN/checkpoints/STEP/                see `qi2_jax.training.checkpoint`
JOB/job.json  JOB/transformer/       a job (`qi2_jax.job.main`) and its run
"""

import dataclasses
import pathlib

from qi2_jax.interop import components, folder
from qi2_jax.interop import weights as storage
from qi2_jax.interop.weights import Weights
from qi2_jax.training import checkpoint

MODEL, CHECKPOINTS = "model", "checkpoints"
JOB, TRANSFORMER = "job.json", "transformer"


@dataclasses.dataclass(frozen=True)
class Located:
    """A model folder and, for a run, the checkpoint whose transformer replaces the folder's."""

    model: pathlib.Path
    checkpoint: pathlib.Path | None = None

    def weights(self, name: str, item: str = "ema") -> Weights:
        """Weights of a component; `item` chooses between a checkpoint's "ema" and "model".

        Raises:
          ValueError: if they are missing or do not match the component's configuration.
        """
        expected = components.COMPONENTS[name].expected(components.read_config(self.model / name, name))
        if name == "transformer" and self.checkpoint is not None:
            found = checkpoint.weights(self.checkpoint, item)
            shapes = {key: weight.shape for key, weight in found.items()}
            storage.check_ours(shapes, expected, str(self.checkpoint))
            return found
        return storage.of_ours(self.model / name, expected)[0]


def model_of(path: pathlib.Path) -> pathlib.Path:
    """The model folder of a job or a run; any other folder is taken for one itself."""
    if (path / JOB).is_file():
        path = path / TRANSFORMER
    return path / MODEL if (path / MODEL).is_dir() else path


def locate(path: pathlib.Path | str, item: str = "ema") -> Located:
    """Finds the model in a run (its newest checkpoint), in a job's run, in one checkpoint, or in an imported folder.

    Raises:
      ValueError: if the path is none of these, saying what was looked for, or is a folder with one set of weights where
        `item` asks for others.
    """
    path = pathlib.Path(path).absolute()
    if (path / JOB).is_file():
        path = path / TRANSFORMER
    if (path / folder.MARK).is_file():
        if item != "ema":
            raise ValueError(f"{path} holds one set of weights, not those of a run: leave --weights {item} out")
        return Located(path)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if (run / MODEL / folder.MARK).is_file():
        steps = checkpoint.steps(run / CHECKPOINTS)
        if run != path:
            if path.name not in map(str, steps):
                raise ValueError(f"{path} is not a complete checkpoint; {run} has those of the steps {steps}")
            return Located(run / MODEL, path)
        if not steps:
            raise ValueError(f"{run} has no complete checkpoint yet in {run / CHECKPOINTS}")
        return Located(run / MODEL, run / CHECKPOINTS / str(steps[-1]))
    raise ValueError(
        f"{path} is neither a run ({MODEL}/{folder.MARK}) or job ({JOB}), nor a checkpoint of one, nor an imported "
        f"folder ({folder.MARK}); `qi2 import` turns a diffusers folder into one"
    )
