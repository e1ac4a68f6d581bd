"""Commands refuse what cannot work before they work for minutes, and say the way out."""

import argparse
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from qi2_jax.cli import export, main
from qi2_jax.interop import folder
from qi2_jax.runtime import errors
from qi2_jax.text.prompts import PromptProcessor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.jpg"], "'x.jpg' must end in .png"),
        (["--out", "x.png", "--seed", str(1 << 32)], "is not an integer from 0 to"),
        (["--out", "x.png", "--seed", "-1"], "is not an integer from 0 to"),
        (["--out", "x.png", "--size", "64"], "does not look like 1024x768"),
        (["--out", "x.png", "--size", "65x64"], "size 65x64 must have sides that are multiples of 32"),
        (["--out", "x.png", "--size", "1000000000x32"], "pixels, up to 8192"),
        (["--out", "x.png", "--steps", "0"], "'0' is not an integer from 1 to"),
        (["--out", "x.png", "--batch-size", "0"], "'0' is not an integer from 1 to"),
        (["--out", "x.png", "--guidance", "nan"], "'nan' is not a number >= 1"),
        (["--out", "x.png", "--guidance", "-1"], "'-1' is not a number >= 1"),
        (["--out", "x.png", "--guidance", "inf"], "'inf' is not a number >= 1"),
        (["--out", "x.png", "--resolution", "0"], "'0' is not an integer from 32 to"),
        (["--out", "x.png", "--prompts", "file"], "not allowed with argument --prompt"),
    ],
)
def test_arguments_of_generation_are_checked_first(arguments, message, capsys):
    verbs = ["edit"] if "--resolution" in arguments else ["sample", "edit"]
    for verb in verbs:
        image = ["--image", "x.png"] if verb == "edit" else []
        with pytest.raises(SystemExit, match="2"):
            main.main([verb, "anywhere", "--prompt", "a fox", *image, *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "latin.txt"], r"latin\.txt is not UTF-8 text"),
        (["--prompts", "."], "is not a file; give a text file with one prompt per line"),
        (["--prompts", "blank.txt"], "contains no prompt"),
        (["--prompt", "caf\udce9"], "is not UTF-8 text"),
        (["--prompt", "a fox", "--guidance", "2", "--negative", "\udce9"], "is not UTF-8 text"),
        (["--prompt", "a fox", "--negative", "blur"], "no effect without guidance"),
        (["--prompt", "a fox", "--latents", "nan.npy"], "not finite"),
        (["--prompt", "a fox", "--weights", "model"], "has a single set of weights"),
    ],
)
def test_what_generation_reads_is_checked_before_the_model_is_loaded(
    arguments, message, imported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    np.save(tmp_path / "nan.npy", np.full((1, 4, 16), np.nan, np.float32))
    monkeypatch.setattr("qi2_jax.interop.stored_weights.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match=message):
        main.main(["sample", str(imported), "--out", "x.png", *arguments])


def test_edits_take_prompts_from_a_file_and_a_size(imported, tmp_path):
    prompts = "make\u2028it night\r\n\r\nmake it day\r\n"  # as a Windows editor saves two prompts
    (tmp_path / "prompts.txt").write_bytes(prompts.encode("utf-16"))
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "in.png")
    arguments = [str(imported), "--image", str(tmp_path / "in.png"), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--size", "64x32", "--resolution", "64", "--steps", "2", "--dtype", "float32"]
    main.main(["edit", *arguments, "--out", str(tmp_path / "x.png")])
    assert [Image.open(tmp_path / f"x_{index}.png").size for index in range(2)] == [(64, 32)] * 2


def test_verify_asks_for_diffusers_before_it_exports(imported, tmp_path, monkeypatch):
    monkeypatch.setattr("qi2_jax.evaluation.torch_process.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs \['torch', 'diffusers'\]"):
        main.main(["export", str(imported), "--out", str(tmp_path / "out"), "--verify"])
    assert not (tmp_path / "out").exists()


def test_help_names_the_steps_of_data_and_what_counts(capsys):
    said = {}
    for arguments in (("--help",), ("data", "--help"), ("data", "cache", "--help")):
        with pytest.raises(SystemExit, match="0"):
            main.main([*arguments])
        said[arguments] = " ".join(capsys.readouterr().out.split())
    steps = "ingest or synth, score, select, cache, report"
    assert steps in said[("--help",)] and steps in said[("data", "--help")]
    assert "experiment whose data.* and encode.* to use" in said[("data", "cache", "--help")]


def test_errors_are_messages_and_a_traceback_can_be_had(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    asked = ["sample", str(tmp_path), "--prompt", "a fox", "--out", str(tmp_path / "file" / "x.png")]
    with pytest.raises(SystemExit, match=r"qi2 sample: .*file"):
        main.main(asked)
    monkeypatch.setenv(errors.TRACEBACK, "1")
    with pytest.raises(OSError, match="file"):
        main.main(asked)


def test_training_needs_a_config_with_a_transformer(tmp_path):
    curriculum = "experiments/qwen_image_2/curriculum.py:tiny"
    with pytest.raises(SystemExit, match=r"curriculum\.py:tiny is a curriculum; train with the config of a stage"):
        main.main(["train", curriculum, "--samples", str(tmp_path), "--out", str(tmp_path / "run")])


def test_import_refuses_a_tokenizer_that_does_not_fit_before_it_copies(published, tmp_path):
    shutil.copytree(published, tmp_path / "published")
    (tmp_path / "published" / "processor" / "tokenizer.json").write_text("{}")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "published" / "processor" / name).unlink(missing_ok=True)
    with pytest.raises(SystemExit, match=r"qi2 import: .*no readable Qwen tokenizer"):
        main.main(["import", str(tmp_path / "published"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_import_reads_no_processor_file_that_leads_out_or_is_too_large(published, tmp_path, monkeypatch):
    monkeypatch.setattr(PromptProcessor, "from_folder", lambda *_: pytest.fail("the processor was read"))
    outside, large = tmp_path / "outside", tmp_path / "large"
    for source in (outside, large):
        shutil.copytree(published, source, copy_function=os.link)
        (source / "processor" / "tokenizer.json").unlink(missing_ok=True)
    (outside / "processor" / "tokenizer.json").symlink_to("/etc/passwd")
    (large / "processor" / "additional_chat_templates").mkdir()
    with open(large / "processor" / "additional_chat_templates" / "huge.jinja", "wb") as file:
        file.truncate(1 << 30)
    for source, message in ((outside, "tokenizer.json -> /etc/passwd"), (large, r"huge\.jinja'\] have more than")):
        with pytest.raises(SystemExit, match=message):
            main.main(["import", str(source), "--out", str(tmp_path / "out")])


def test_verify_rounds_as_the_export_did_and_finds_one_wrong_tensor(imported, tmp_path, capsys):
    out = tmp_path / "exported"
    main.main(["export", str(imported), "--out", str(out), "--dtype", "bfloat16", "--verify"])
    printed = capsys.readouterr().out
    assert printed.count("of the latents, relative: ") == 2 and "an edit with guidance" in printed

    folder.export_folder(imported, tmp_path / "spoiled")
    (path,) = (tmp_path / "spoiled" / "transformer").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "proj_out.weight": tensors["proj_out.weight"] * 1.01}, path)
    arguments = argparse.Namespace(model=imported, out=tmp_path / "spoiled", weights="ema", dtype=None)
    with pytest.raises(ValueError, match="does not generate the same images"):
        export._verify(arguments)
