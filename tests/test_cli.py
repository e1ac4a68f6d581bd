"""Commands refuse what cannot work before they work for minutes, and say the way out."""

import shutil

import ml_collections
import pytest
import safetensors.numpy

from qi2_jax import cli, export
from qi2_jax.interop import folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.jpg"], "'x.jpg' must end in .png"),
        (["--out", "x.png", "--seed", str(1 << 32)], "is no integer from 0 to"),
        (["--out", "x.png", "--seed", "-1"], "is no integer from 0 to"),
        (["--out", "x.png", "--size", "64"], "does not look like 1024x768"),
    ],
)
def test_arguments_of_sample_are_checked_first(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sample", "anywhere", "--prompt", "a fox", *arguments])
    assert message in capsys.readouterr().err


def test_errors_are_messages_and_a_traceback_can_be_had(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    asked = ["sample", str(tmp_path), "--prompt", "a fox", "--out", str(tmp_path / "file" / "x.png")]
    with pytest.raises(SystemExit, match=r"qi2 sample: .*file"):
        cli.main(asked)
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(OSError, match="file"):
        cli.main(asked)


def test_import_refuses_a_tokenizer_that_does_not_fit_before_it_copies(published, tmp_path):
    shutil.copytree(published, tmp_path / "published")
    (tmp_path / "published" / "processor" / "tokenizer.json").write_text("{}")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "published" / "processor" / name).unlink(missing_ok=True)
    with pytest.raises(SystemExit, match=r"qi2 import: .*no readable Qwen tokenizer"):
        cli.main(["import", str(tmp_path / "published"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_verify_rounds_as_the_export_did_and_finds_one_wrong_tensor(imported, tmp_path, capsys):
    out = tmp_path / "exported"
    cli.main(["export", str(imported), "--out", str(out), "--dtype", "bfloat16", "--verify"])
    printed = capsys.readouterr().out
    assert printed.count("of the latents, relative: ") == 2 and "an edit with guidance" in printed

    folder.export_folder(imported, tmp_path / "spoiled")
    (path,) = (tmp_path / "spoiled" / "transformer").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "proj_out.weight": tensors["proj_out.weight"] * 1.01}, path)
    arguments = ml_collections.ConfigDict(
        {"model": imported, "out": tmp_path / "spoiled", "weights": "ema", "dtype": None}
    )
    with pytest.raises(ValueError, match="does not generate the same images"):
        export.verify(arguments)
