"""Fixed prompts and edits: what is refused, and that the encoders are released."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from PIL import Image

from qi2_jax import sharding
from qi2_jax.config.parsing import parse
from qi2_jax.tasks.transformer import fixed_prompts
from qi2_jax.tasks.transformer.config import check_transformer
from qi2_jax.tasks.transformer.samples_config import Samples
from qi2_jax.workflows.config import load_experiment


def asked(**changes):
    """The demo's stage with other fixed prompts and edits."""
    config = load_experiment("experiments/demo.py:tiny")
    values = {**config.transformer.as_typed["samples"], **{"every": 1, **changes}}
    samples = parse(Samples, values, "transformer.samples")
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, samples=samples))


def write_image(path, width, height):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a cat", 3)}, r"samples.prompts\[1\] is 3; it must be a string"),
        ({"prompts": (" ",)}, r"samples.prompts\[0\] has the text ' '; it must not be empty"),
        ({"prompts": ("a \udc80",)}, "which is not UTF-8"),
        ({"prompts": ("a <|image_pad|>",)}, r"with <\|image_pad\|>, which stands for pixels; remove it"),
        ({"edits": (("make it night",),)}, r"samples.edits\[0\] is \('make it night',\); an edit is a tuple of an"),
        ({"edits": (("join", *("a.png",) * 4),)}, "the paths of one to 3 condition images"),
        ({"edits": ("make it night",)}, "is 'make it night'; it must be a tuple"),
        ({"edits": (("make it night", 3),)}, r"edits\[0\]\[1\] is 3; it must be a string"),
        ({"edits": (("make it night", "nowhere/a.png"),)}, r"samples.edits\[0\]: image nowhere/a.png is not a file"),
        ({"edits": (("make it night", "x" * 300),)}, "cannot be read: File name too long"),
        ({"edits": (("make it night", "README.md"),)}, "image README.md: unknown_format"),
        *(
            (
                {"edits": (("make it night", f"scikit-image:{name}"),)},
                "does not come with scikit-image, which has .* coffee.png",
            )
            for name in ("", "cup.png", "../data/coffee.png", "/etc/passwd", "README.txt", "eagle.png")
        ),
    ],
)
def test_what_cannot_be_drawn_is_named_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        check_transformer(asked(**changes))


def test_a_single_text_is_no_tuple_and_a_strip_no_condition(tmp_path):
    with pytest.raises(ValueError, match=r"samples\.prompts is 'a cat'; it must be a tuple"):
        asked(prompts="a cat")
    strip = write_image(tmp_path / "strip.png", 2000, 2)
    with pytest.raises(ValueError, match=r"strip\.png: an image of 2000 x 2 has no side left at resolution 64"):
        fixed_prompts.check_images(asked(edits=(("make it night", strip),)).transformer.samples, 64)


def test_images_of_scikit_image_are_found_in_the_package(monkeypatch):
    config = asked(edits=(("make it blue", "scikit-image:coffee.png"),)).transformer.samples
    fixed_prompts.check_images(config, 64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"image scikit-image:coffee.png: .* pip install 'qi2\[demo\]'; or leave"):
        fixed_prompts.check_images(config, 64)


def test_what_is_not_drawn_need_not_be_there():
    config = asked(every=0, edits=(("make it night", "nowhere/a.png"),)).transformer.samples
    fixed_prompts.check_images(config, 64)


def test_encoders_that_are_missing_are_asked_for(tmp_path):
    (tmp_path / "vae").mkdir()
    config = asked(prompts=("a cat",)).transformer.samples
    message = r"lacks \['text_encoder', 'processor'\], which .* need; name .* with --model, or draw neither with transf"
    with pytest.raises(ValueError, match=message):
        fixed_prompts.encode(config, 64, tmp_path, None, np.float32)
    config = asked(every=0, prompts=("a cat",)).transformer.samples
    assert fixed_prompts.encode(config, 64, tmp_path, None, np.float32) == {}


def test_edits_are_drawn_by_their_number_of_images_and_no_encoder_stays(imported, tmp_path, monkeypatch):
    split, attend = [], sharding.Attention.__call__
    monkeypatch.setattr(
        sharding.Attention, "__call__", lambda self, *rows: split.append(self.mesh) or attend(self, *rows)
    )
    square, wide = write_image(tmp_path / "square.png", 70, 70), write_image(tmp_path / "wide.png", 100, 60)
    config = asked(edits=(("darker", square), ("darker", wide), ("join them", square, wide)))
    check_transformer(config)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    mesh = sharding.make_mesh(sharding.MeshShape(tensor=2), jax.devices()[:2])
    panels = fixed_prompts.encode(config.transformer.samples, 64, imported, mesh, np.float32)
    assert {of.size for of in split} == {2}, "a Pallas kernel cannot be split over devices by the compiler"
    assert not [array.shape for array in jax.live_arrays() if id(array) not in before and array.size > 100]
    assert list(panels) == ["edits-1", "edits-2"]
    one, two = panels.values()
    assert one.layout.target == 4 * 6 and one.layout.conditions == (4 * 6,) and two.layout.conditions == (16, 4 * 6)
    assert [sample.latents.shape[:2] for sample in one.samples] == [(4, 4), (4, 6)]  # as wide as the last image
    (joined,) = two.samples
    assert [image.shape[:2] for image in joined.conditions] == [(4, 4), (4, 6)] and joined.latents.shape[:2] == (4, 6)
