"""`qi2 eval vae` compares models with a linear code of equal size."""

import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qi2_jax.cli import main
from tests.evaluation import inputs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return inputs.write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory):
    return inputs.write_lpips(tmp_path_factory.mktemp("lpips"))


def test_a_model_stands_beside_the_linear_code(imported, pictures, lpips_folder, tmp_path, capsys):
    files = ["--json", str(tmp_path / "eval.json"), "--out", str(tmp_path / "sheets"), "--worst", "2"]
    main.main(["eval", "vae", "--data", str(pictures), "--model", str(imported), "--lpips", str(lpips_folder), *files])
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("linear code", "f16c16", "LPIPS", "rFID(vgg16)", "undecodable (photo/broken.png)", "too_small"):
        assert text in printed
    assert "fitted on the evaluated images themselves" in printed and "Quoted, not measured here" in printed
    written = json.loads((tmp_path / "eval.json").read_text())
    assert [(row["set"], row["model"]) for row in written["rows"]] == [
        (name, model) for name in ("photo 64p", "text 64p", "all") for model in ("linear code", str(imported))
    ]
    linear, model = written["rows"][-2:]
    assert linear["images"] == model["images"] == 3 and written["refused"].keys() == {"undecodable", "too_small"}
    assert linear["psnr"] > model["psnr"] and linear["lpips"] < model["lpips"]  # the model has random weights
    assert linear["ms_ssim"] is None and linear["frechet"] >= 0
    each = written["models"][1]["images"]
    assert model["psnr"] == pytest.approx(np.mean([image["psnr"] for image in each]))
    assert len(written["quoted"]["rows"]) == 10 and len(written["lpips_sha256"]) == 64
    sheets = sorted((tmp_path / "sheets").iterdir())
    assert [path.name.split("_")[1] for path in sheets] == ["0", "1"]
    assert Image.open(sheets[0]).width > 3 * 64


def test_without_models_and_weights_only_the_linear_code_is_measured(pictures, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "one.png")
    (tmp_path / "words.png").write_bytes(b"words")
    main.main(["eval", "vae", "--data", str(pictures), "--fit", str(tmp_path), "--side", "32"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "f16c64" in printed and f"fitted on {tmp_path}" in printed.replace("- ", "-")
    assert "LPIPS was not measured: give its weights with --lpips FOLDER" in printed and "rFID" not in printed
    assert "fewer than 100 patches per component" in printed
    assert "1 images could not be read: {'unknown_format': 1}" in printed


def test_results_are_written_although_a_model_fails(imported, pictures, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(imported / "vae", broken)
    weights = load_file(broken / "model.safetensors")
    save_file({name: np.full_like(values, np.nan) for name, values in weights.items()}, broken / "model.safetensors")
    files = ["--json", str(tmp_path / "eval.json"), "--out", str(tmp_path / "sheets"), "--worst", "2"]
    models = ["--model", str(broken), "--model", str(imported)]
    with pytest.raises(
        SystemExit, match=r"qi2 eval: 1 of 2 models could not be measured:\n.*broken: .*NaN or infinity"
    ):
        main.main(["eval", "vae", "--data", str(pictures), *models, *files])
    written = json.loads((tmp_path / "eval.json").read_text())
    assert {row["model"] for row in written["rows"]} == {"linear code", str(imported)}
    assert written["failed"].keys() == {str(broken)} and len(list((tmp_path / "sheets").iterdir())) == 2
    assert "broken could not be measured: the model produced NaN" in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_named(pictures, tmp_path):
    (tmp_path / "words.png").write_bytes(b"words")
    refused = rf"qi2 eval: no image in {tmp_path} could be read; refused: {{'unknown_format': 1}}"
    for folders in ([tmp_path], [tmp_path, pictures], [pictures, tmp_path]):
        flags = zip(("--data", "--fit"), map(str, folders), strict=False)
        with pytest.raises(SystemExit, match=refused):
            main.main(["eval", "vae", *itertools.chain(*flags)])
    with pytest.raises(SystemExit, match=r"has no records, from which --held-out 0\.1 could choose"):
        main.main(["eval", "vae", "--data", str(pictures), "--held-out", "0.1"])
    with pytest.raises(SystemExit, match="which is only read"):
        main.main(["eval", "vae", "--data", str(pictures), "--out", str(pictures / "sheets")])
    with pytest.raises(SystemExit, match="2"):
        main.main(["eval", "vae", "--data", str(pictures), "--side", "7"])
