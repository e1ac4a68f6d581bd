import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import Bucket
from data_pipeline.samples.prepare import prepare_image
from qi2_jax.pixels import over_white


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 500), (500, 33), (64, 32)])
def test_shape_and_dtype(picture, channels, size):
    pixels = prepare_image(picture(size=size), Bucket(64, 32), channels)
    assert pixels.shape == (32, 64, channels) and pixels.dtype == np.uint8
    assert channels == 3 or (pixels[..., 3] == 255).all()


def test_image_of_the_right_size_is_untouched(picture):
    image = picture(size=(64, 32))
    np.testing.assert_array_equal(prepare_image(image, Bucket(64, 32)), np.asarray(image))


def test_crop_is_centred_and_not_stretched():
    image = Image.new("RGB", (400, 100), "black")
    image.paste("white", (150, 0, 250, 100))  # the middle square
    pixels = prepare_image(image, Bucket(32, 32)).astype(int)
    assert (pixels > 200).mean() > 0.9 and pixels[:, 8:24].min() > 250
    image = Image.new("RGB", (90, 300), "black")
    image.paste("white", (30, 135, 60, 165))  # a square stays a square in the middle
    white = prepare_image(image, Bucket(96, 96))[..., 0] > 127
    assert (white.any(axis=0).sum(), white.any(axis=1).sum(), white.sum()) == (32, 32, 32 * 32)
    assert np.flatnonzero(white.any(axis=0))[0] == np.flatnonzero(white.any(axis=1))[0] == 32


def test_mirrored_input_gives_mirrored_output(picture):
    image = picture(size=(101, 67))
    mirrored = prepare_image(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Bucket(32, 48))[:, ::-1]
    assert abs(prepare_image(image, Bucket(32, 48)).astype(int) - mirrored).max() <= 1


def test_alpha_is_kept_or_put_on_white(picture):
    image = picture(size=(64, 64)).convert("RGBA")
    image.paste((90, 0, 0, 0), (0, 0, 32, 64))
    four, three = prepare_image(image, Bucket(32, 32), 4), prepare_image(image, Bucket(32, 32), 3)
    assert (four[:, :12] == (255, 255, 255, 0)).all() and (four[:, 20:, 3] == 255).all()
    assert (three[:, :12] == 255).all()
    # Resizing and compositing commute up to clipped overshoot: the hidden colour makes no dark fringe.
    assert abs(np.asarray(over_white(Image.fromarray(four))).astype(int) - three).max() <= 8


def test_wrong_inputs():
    for image, channels in ((Image.new("L", (9, 9)), 3), (Image.new("RGB", (9, 9)), 1)):
        with pytest.raises(ValueError, match=f"channels={channels}"):
            prepare_image(image, Bucket(32, 32), channels)
