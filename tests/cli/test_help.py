"""`--help` and `--version` import nothing that takes time, for every verb and every step of a verb."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from qi2_jax.cli import data, export, main, synth

# Libraries that take from 50 ms to seconds each.
HEAVY = (
    *("jax", "flax", "optax", "orbax", "transformers", "torch", "diffusers", "numpy", "scipy", "pyarrow", "PIL"),
    *("safetensors", "ml_collections", "onnxruntime", "array_record", "grain", "tensorboardX", "apache_beam", "icu4py"),
    *("babel", "fontTools", "jinja2", "rich", "tqdm", "jaxtyping"),
)
STEPS = {"data": ("ingest", "synth", "score", "select", "cache", "report"), "synth": ("text", "edits")}
COMMANDS = [
    (),
    *((verb,) for verb in main.VERBS),
    *(("data", step) for step in STEPS["data"]),
    ("eval", "vae"),
    *(("data", "synth", kind) for kind in STEPS["synth"]),
]
PROGRAM = """
import contextlib, io, json, sys
from qi2_jax.cli import main
commands, heavy = json.loads(sys.argv[1])
found = []
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main.main(command)
    found.append([printed.getvalue(), sorted(set(heavy) & sys.modules.keys())])
print(json.dumps(found))
"""


def printed(commands) -> list[str]:
    """What the commands print, in one process, which must not import a heavy library."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([commands, HEAVY])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[2])
    found = json.loads(done.stdout)
    for asked, (_, imported) in zip(commands, found, strict=True):
        assert imported == [], asked
    return [text for text, _ in found]


def test_help_imports_nothing_heavy():
    commands = [[*command, "--help"] for command in COMMANDS]
    for command, text in zip(commands, printed(commands), strict=True):
        assert text.startswith("usage: qi2"), command
        assert "--help" in text


def test_mistakes_in_arguments_import_nothing_heavy():
    image = ["anywhere", "--prompt", "a fox", "--out", "x.png"]
    printed([["sample", *image, "--size", "33x64"], ["edit", *image, "--image", "x.png", "--resolution", "7"]])


def test_every_step_of_data_is_tested(capsys):
    for arguments, steps in ((["data"], STEPS["data"]), (["data", "synth"], STEPS["synth"])):
        with pytest.raises(SystemExit):
            main.main([*arguments, "--help"])
        (listed,) = re.findall(r"^  ([A-Z]+)$((?:\n    [a-z].*|\n {10,}.*)+)", capsys.readouterr().out, re.MULTILINE)
        assert re.findall(r"^    ([a-z]+)", listed[1], re.MULTILINE) == list(steps)


def test_version_names_what_a_bug_report_needs():
    (text,) = printed([["--version"]])
    assert re.fullmatch(r"qi2 [\d.]+, jax [\d.]+, Python 3[\d.]+\n", text)


def test_optional_arguments_are_not_called_required(capsys):
    for command in (["train"], ["run"], ["data", "select"], ["data", "cache"]):
        with pytest.raises(SystemExit, match="2"):
            main.main(command)
        assert "KEY=VALUE" not in capsys.readouterr().err.partition("required:")[2]


def test_overrides_may_stand_behind_options(monkeypatch):
    parsed, _ = main._parse(["train", "E", "a=1", "--samples", "S", "--out", "O", "b.c=2"], "train")
    assert parsed.overrides == ["a=1", "b.c=2"]
    again, _ = main._parse(["train", "E", "--samples", "S", "--out", "O"], "train")
    assert again.overrides == []


def test_help_agrees_with_the_libraries():
    from data_pipeline.records.schema import MAX_IMAGE_BYTES
    from data_pipeline.selection import index
    from data_pipeline.synthesis.edits import synthesis as edits
    from data_pipeline.synthesis.text import synthesis as text
    from qi2_jax.workflows import verify

    assert (tuple(edits.KINDS), tuple(text.STRATEGIES)) == (synth.EDITS, synth.STRATEGIES)
    assert text.DEFAULT == synth.DEFAULT_STRATEGIES
    assert data.INDEX == index.INDEX and MAX_IMAGE_BYTES == 64 << 20
    assert set(export.DTYPES) == set(verify.CODES)
