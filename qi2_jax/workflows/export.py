"""Export of a trained model as a diffusers folder."""

import pathlib
import shutil

from qi2_jax.interop import folder
from qi2_jax.runs import locating

NOT_EXPORTED = "nothing is exported, because diffusers cannot run bidirectional attention"


def export(run_folder: pathlib.Path, out: pathlib.Path) -> None:
    """Exports the model of a run. An earlier export in `out` is replaced when the new one is complete."""
    located, fresh = locating.locate(run_folder), out.with_name(f"{out.name}.new")
    located.check()
    shutil.rmtree(fresh, ignore_errors=True)  # leftovers of a killed attempt
    folder.export_folder(located.model, fresh, replace={"transformer": located.weights("transformer")})
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
