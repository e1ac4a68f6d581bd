"""What the README shows is run as it stands."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image

from qi2_jax.cli import main

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example():
    (example,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss 1\.\d+ of 1\d\d,\d{3} parameters\n|loss 2\.\d+ of .* parameters\n", done.stdout)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A folder in which the README's commands were run one after the other, and what each printed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    (commands,) = blocks("bash")
    printed = {}
    for command in commands.strip().splitlines():
        done = subprocess.run(
            command,
            shell=True,  # lines of our own README
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        printed[command.split()[1]] = done.stdout
    return folder, printed


def test_commands_make_what_they_promise(session):
    folder, _ = session
    assert (folder / "runs/tiny/report.json").is_file()
    assert Image.open(folder / "runs/sample.png").size == (64, 96)
    edited = Image.open(folder / "runs/edit.png")
    assert edited.mode == "RGBA" and edited.width * edited.height == pytest.approx(320 * 320, rel=0.1)
    assert json.loads((folder / "runs/ingest.json").read_text())["records"] == 37
    assert pq.read_table(folder / "runs/records/selection.parquet").num_rows == 26
    assert "<svg" in (folder / "runs/report.html").read_text()
    assert "<svg" in (folder / "runs/training.html").read_text()
    assert (folder / "runs/lora/pytorch_lora_weights.safetensors").is_file()
    assert (folder / "runs/exported/model_index.json").is_file() and (folder / "runs/imported/qi2.json").is_file()


def test_exported_pipeline_generates_the_same_images(session):
    _, printed = session
    differences = re.findall(r"largest difference to diffusers over \d images: (\d+) of 255", printed["export"])
    assert len(differences) == 2 and max(map(int, differences)) <= 1


def test_job_reports_what_was_dropped_and_why(session):
    _, printed = session
    for reason in ("same_bytes", "same_pixels", "near", "undecodable", "too_small", "already_turned", "bad_json"):
        assert reason in printed["run"]


def test_every_verb_has_help():
    for verb in main.VERBS:
        done = subprocess.run(
            [sys.executable, "-m", "qi2_jax", verb, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0 and f"usage: qi2 {verb}" in done.stdout
