"""Export of a trained model as a diffusers folder."""

import pathlib
import shutil

from qi2_jax.interop import folder
from qi2_jax.runs import locating

NOT_EXPORTED = "diffusers cannot run bidirectional attention: nothing is exported"


def export(run_folder: pathlib.Path, out: pathlib.Path) -> None:
    """Exports beside an earlier export and then takes its place."""
    located, fresh = locating.locate(run_folder), out.with_name(f"{out.name}.new")
    located.check()
    shutil.rmtree(fresh, ignore_errors=True)  # of a killed attempt
    folder.export_folder(located.model, fresh, replace={"transformer": located.weights("transformer")})
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
