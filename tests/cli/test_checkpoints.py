"""`qi2 checkpoints`: what it lists, inspects, verifies and marks."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from qi2_jax.cli import checkpoints as verb
from qi2_jax.cli import main
from qi2_jax.runs import paths
from qi2_jax.training.checkpoints import checksums, files, inspection
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.checkpoints.retention import Policy
from qi2_jax.training.step import TrainState

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 4, 8 and 12. Not to be written to."""
    run = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(run / paths.CHECKPOINTS, Policy(keep=9))
    for step in (4, 8, 12):
        tree = {"w": jnp.ones((8, 256)), "b": jnp.ones(3, jnp.bfloat16)}
        scalars = {name: jnp.int32(0) for name in TrainState._fields if name.startswith("skipped")}
        state = TrainState(step=jnp.int32(step), model=tree, optimizer={"mu": tree}, ema=tree, **scalars)
        config = {"optimizer": {"lr": 0.1 if step < 12 else 0.2}, "checkpoint": {"every": 4, "keep": 2, "keep_best": 1}}
        metrics = {"loss": 1.0 / step, "validation_loss": float(step)}
        checkpoints.save(state, {"config": config, "metrics": metrics, "commit": "abc"})
    checkpoints.close()
    return run


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def asked(tmp_path, *arguments: str) -> dict:
    main.main(["checkpoints", *arguments, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def test_list_says_what_is_kept_and_why(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    directory = copied / paths.CHECKPOINTS
    (directory / "12" / "checksums-0.json").unlink()
    files.set_aside(directory, 8)
    figures = asked(tmp_path, str(copied), "--keep", "4")
    assert figures["damaged"] == ["8.damaged"]
    first, last = figures["checkpoints"]
    assert (first["step"], first["kept"], first["verified"]) == (4, ["latest", "best", "marked"], True)
    assert (last["step"], last["kept"], last["verified"]) == (12, ["latest"], False)
    assert first["marked"] and not last["marked"]
    assert first["metrics"] == {"loss": 0.25, "validation_loss": 4.0} and first["bytes"] > 8192
    printed = capsys.readouterr().out
    for text in ("marked", "0.2500", "unverified", "8.damaged is set aside", "KiB"):
        assert text in printed
    assert not asked(tmp_path, str(copied), "--unkeep", "4")["checkpoints"][0]["marked"]


def test_inspect_shows_items_manifest_and_what_changed(saved, tmp_path, capsys):
    figures = asked(tmp_path, str(saved), "--inspect", "12")
    assert figures["items"]["model"] == {
        "leaves": 2,
        "parameters": 2051,
        "bytes": 8198,
        "dtypes": ["bfloat16", "float32"],
    }
    assert figures["config_changes"] == ["optimizer.lr: 0.1 -> 0.2"] and figures["manifest"]["commit"] == "abc"
    printed = capsys.readouterr().out
    assert "config changes since step 8" in printed and "2,051" in printed and '"commit": "abc"' in printed
    assert asked(tmp_path, str(saved), "--inspect", "8")["config_changes"] == []
    assert "the config is that of step 4" in capsys.readouterr().out


def test_verify_names_what_is_wrong_and_fails(copied, tmp_path, capsys):
    directory = copied / paths.CHECKPOINTS
    assert asked(tmp_path, str(copied), "--verify") == {"steps": {"4": [], "8": [], "12": []}}
    (directory / "4" / "checksums-0.json").unlink()
    os.truncate(directory / "8" / "ema" / "_METADATA", 5)
    with pytest.raises(SystemExit, match=r"8: ema/_METADATA has 5 bytes instead of") as caught:
        asked(tmp_path, str(copied), "--verify")
    assert "12: " not in str(caught.value)
    figures = json.loads((tmp_path / "figures.json").read_text())["steps"]
    assert figures["4"] is None and len(figures["8"]) == 1 and figures["12"] == []
    assert "step 4: unverified" in capsys.readouterr().out
    assert asked(tmp_path, str(copied), "--verify", "12") == {"steps": {"12": []}}


@pytest.mark.parametrize("moment", ["listing", "hashing"])
def test_a_step_that_is_deleted_while_it_is_read_is_not_damaged(moment, copied, tmp_path, capsys, monkeypatch):
    directory, of_files, digest = copied / paths.CHECKPOINTS, files.files, checksums._digest

    def deleted(path):
        if (directory / "8") in (path, *path.parents) and path.exists():
            assert files.remove(directory, 8)

    def listed(path):
        deleted(path)
        return of_files(path)

    def hashed(path):
        deleted(path)
        return digest(path)

    if moment == "listing":
        monkeypatch.setattr(files, "files", listed)
    else:
        monkeypatch.setattr(checksums, "_digest", hashed)
        monkeypatch.setattr(checksums, "_THREADS", 1)
    assert asked(tmp_path, str(copied), "--verify") == {"steps": {"4": [], "12": []}}
    assert "step 8: deleted meanwhile" in capsys.readouterr().out


def test_a_job_a_run_and_a_folder_of_checkpoints_are_found(saved, tmp_path):
    (tmp_path / paths.TRANSFORMER).symlink_to(saved)
    for path in (saved, saved / paths.CHECKPOINTS, tmp_path):
        assert [row["step"] for row in inspection.listing(verb.folder_of(path))["checkpoints"]] == [4, 8, 12]


def test_of_a_curriculum_the_latest_stage_that_has_checkpoints_is_shown(saved, tmp_path):
    (tmp_path / paths.CURRICULUM).write_text('{"order": ["pairs", "edits", "fine"]}')
    for stage in ("pairs", "edits", "fine"):
        (tmp_path / paths.STAGES / stage).mkdir(parents=True)
    for stage in ("pairs", "edits"):
        (tmp_path / paths.STAGES / stage / paths.TRANSFORMER).symlink_to(saved)
    found = verb.folder_of(tmp_path)
    assert found == tmp_path / paths.STAGES / "edits" / paths.TRANSFORMER / paths.CHECKPOINTS


@pytest.mark.parametrize("action", [["--verify", "5"], ["--inspect", "5"], ["--keep", "5"], ["--unkeep", "4"]])
def test_steps_that_do_not_exist_are_refused(saved, action):
    with pytest.raises(SystemExit, match=r"qi2 checkpoints: .*(5.*only \[4, 8, 12\]|4 .* is not marked)"):
        main.main(["checkpoints", str(saved), *action])


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no complete checkpoint"):
        main.main(["checkpoints", str(tmp_path)])


def test_a_listing_and_a_verification_load_no_jax(saved):
    program = "import sys; from qi2_jax.cli.main import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    for action in ([], ["--verify"]):
        command = [sys.executable, "-c", program, "checkpoints", str(saved), *action]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=pathlib.Path(__file__).parents[2]
        )
        assert done.returncode == 0, done.stderr
