"""`qi2 eval vae` compares models with a linear code of equal size."""

import json

import numpy as np
import pytest
from PIL import Image

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


def test_mistakes_are_named(pictures, tmp_path):
    with pytest.raises(SystemExit, match=r"qi2 eval: no image in .* could be read"):
        main.main(["eval", "vae", "--data", str(tmp_path), "--fit", str(pictures)])
    with pytest.raises(SystemExit, match="which is only read"):
        main.main(["eval", "vae", "--data", str(pictures), "--out", str(pictures / "sheets")])
    with pytest.raises(SystemExit, match="2"):
        main.main(["eval", "vae", "--data", str(pictures), "--side", "7"])
