"""Commands refuse what cannot work before they work for minutes, and say the way out."""

import shutil

import ml_collections
import pytest
import safetensors.numpy

from qi2_jax import cli, export
from qi2_jax.config import claim
from qi2_jax.interop import folder
from qi2_jax.job import main as job


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
    assert "of the latents, relative: " in capsys.readouterr().out

    folder.export_folder(imported, tmp_path / "spoiled")
    (path,) = (tmp_path / "spoiled" / "transformer").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "proj_out.weight": tensors["proj_out.weight"] * 1.01}, path)
    arguments = ml_collections.ConfigDict(
        {"model": imported, "out": tmp_path / "spoiled", "weights": "ema", "dtype": None}
    )
    with pytest.raises(ValueError, match="does not generate the same images"):
        export.verify(arguments)


def test_job_may_be_changed_until_something_is_made_from_it(tmp_path):
    claim(tmp_path / "job.json", {"source": "a", "data": {"side": 64}}, job.may_change(tmp_path, {"data", "source"}))
    claim(tmp_path / "job.json", {"source": "a", "data": {"side": 96}}, job.may_change(tmp_path, {"data", "source"}))
    with pytest.raises(ValueError, match="source: 'a' -> 'b'"):
        claim(
            tmp_path / "job.json", {"source": "b", "data": {"side": 96}}, job.may_change(tmp_path, {"data", "source"})
        )
    (tmp_path / "transformer" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="side: 96 -> 64"):
        claim(
            tmp_path / "job.json", {"source": "a", "data": {"side": 64}}, job.may_change(tmp_path, {"data", "source"})
        )


@pytest.mark.parametrize(
    ("own", "difference", "message"),
    [(0.5, 0, "only 50% of the samples"), (None, 3, "up to 3 of 255 apart"), (1.0, 2, "other images")],
)
def test_job_fails_where_its_figures_are_worse_than_expected(own, difference, message):
    figures = {"samples_nearest_to_own_image": own, "largest_difference_to_pytorch": difference}
    expect = ml_collections.ConfigDict({"nearest_to_own": 0.9, "difference_to_pytorch": 1})
    with pytest.raises(ValueError, match=message):
        job.check(figures, expect)
    job.check({"samples_nearest_to_own_image": 0.95, "largest_difference_to_pytorch": 1}, expect)
