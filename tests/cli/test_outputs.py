"""No command writes over what it reads, or into a folder that it reads or that belongs to a run."""

import pytest
from PIL import Image

from qi2_jax.cli import main

CONFIG = ("--config", "experiments/demo.py:tiny")
TINY = "experiments/demo.py:tiny"


@pytest.fixture
def place(tmp_path, imported, monkeypatch):
    """A folder with empty files where records, a job, a run and a model have theirs."""
    monkeypatch.setattr("qi2_jax.runtime.devices.set_platform", lambda *_: None)
    monkeypatch.setattr("qi2_jax.runtime.devices.set_compilation_cache", lambda *_: None)
    names = ("records/manifest.json", "records/scores/size/a.parquet", "samples/manifest.json", "job/job.json")
    for name in (*names, "run/config.json", "run/checkpoints/4/manifest.json", "adapter.safetensors", "clip.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "model").symlink_to(imported)
    Image.new("RGB", (32, 32)).save(tmp_path / "a_1.png")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("train", TINY, "--samples", "@samples", "--out", "@samples"),
        ("train", TINY, "--samples", "@samples", "--out", "@samples/run"),
        ("train", TINY, "--samples", "@samples", "--model", "@model", "--out", "@model/run"),
        ("train", TINY, "--samples", "@samples", "--start", "@run", "--out", "@run/tuned"),
        ("run", TINY, "--data", "@records", "--out", "@records/job"),
        ("import", "@run", "--out", "@run/checkpoints/9"),
        ("import", "@records", "--out", "@records"),
        ("export", "@model", "--out", "@model/out"),
        ("export", "@model", "--out", "@run/checkpoints/9"),
        ("export", "@model", "--out", "@job/sub/out"),
        ("report", "@job", "--out", "@job/job.json"),
        ("report", "@run", "--json", "@run/config.json"),
        ("checkpoints", "@run", "--json", "@run/config.json"),
        ("edit", "@model", "--image", "@a_1.png", "--prompt", "a", "--prompt", "b", "--out", "@a.png"),
        ("data", "ingest", "@records", "--out", "@records"),
        ("data", "ingest", "tfds:x", "@records", "--out", "@records/sub"),
        ("data", "ingest", "@clip.txt", "--out", "@clip.txt"),
        ("data", "synth", "edits", "--from", "@records", "--out", "@records/edits"),
        ("data", "synth", "text", "--scenes", "@records", "--out", "@records/text"),
        ("data", "select", "@records", *CONFIG, "--out", "@records/manifest.json"),
        ("data", "select", "@records", *CONFIG, "--out", "@records/scores/size/a.parquet"),
        ("data", "select", "@records", *CONFIG, "--json", "@records/manifest.json"),
        ("data", "cache", "@records", *CONFIG, "--model", "@model", "--out", "@records"),
        ("data", "cache", "@records", *CONFIG, "--model", "@model", "--out", "@records/scores/samples"),
        ("data", "report", "@records", *CONFIG, "--out", "@records/manifest.json"),
    ],
    ids=" ".join,
)
def test_no_command_writes_where_it_reads(place, command):
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit, match=r"qi2 \w+: --(out|json) .* (is|lies in) .*, which is only read"):
        main.main([str(place / item[1:]) if item.startswith("@") else item for item in command])
    assert sorted(place.rglob("*")) == before
