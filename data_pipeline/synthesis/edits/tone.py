"""Edits of the colour and tone of a whole image."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_pipeline.synthesis.edits.cutouts import Unsuitable
from data_pipeline.synthesis.edits.edit import Edit, Ingredients
from data_pipeline.synthesis.edits.wordings import instructions

GAMMA = 2.2  # approximates sRGB
LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
AMOUNTS = {"a little": ("a little", "稍微"), "much": ("a lot", "明显")}  # English and Chinese wordings
MAX_CLIPPED = 0.06  # share of the pixels that brightening may clip
MIN_CHANGE = 0.01  # mean difference of all values 0..1; less is invisible
MIN_COLOURED = 0.08  # mean saturation below which an image has no colour to change
FORMS = ["saturate", "desaturate", "warm", "cool", "brighten", "darken", "black_and_white", "colourise"]


def tone(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """An image -> the image with other colours or exposure."""
    form = FORMS[int(rng.integers(len(FORMS)))]
    scene = ingredients.scene(rng)
    pixels = np.asarray(scene.image, np.float32) / 255
    coloured = float(np.mean(pixels.max(2) - pixels.min(2)))
    if coloured < MIN_COLOURED and form in ("saturate", "desaturate", "black_and_white", "colourise"):
        raise Unsuitable("picture_without_colour")
    amount = list(AMOUNTS)[int(rng.integers(2))]
    strength = float(rng.uniform(0.8, 1.2)) * (0.5 if amount == "a little" else 1.0)
    changed = adjust(pixels, form, strength)
    if float(np.mean(changed.max(2) >= 1) - np.mean(pixels.max(2) >= 1)) > MAX_CLIPPED:
        raise Unsuitable("picture_too_bright")
    if float(np.abs(changed.clip(0, 1) - pixels).mean()) < MIN_CHANGE:
        raise Unsuitable("picture_hardly_changes")
    image = Image.fromarray((changed.clip(0, 1) * 255).round().astype(np.uint8))
    lot, chinese = AMOUNTS[amount]
    wordings = instructions(f"tone/{form}", rng, {"much": amount, "lot": lot}, {"lot": chinese})
    pair = scene.stored or scene.image, image
    source, target = pair[::-1] if form == "colourise" else pair
    return Edit((source,), target, wordings, ("edit/global", "edit/tone", f"edit/tone/{form}"), (scene,))


def adjust(pixels: Float[np.ndarray, "H W 3"], form: str, strength: float) -> Float[np.ndarray, "H W 3"]:
    """Applies one of FORMS to sRGB values in 0..1; the result may exceed that range.

    Saturation scales the distance to the grey of equal luma. Exposure and white balance are gains of linear light:
    about a stop in either direction, and 30% of red against blue.
    """
    grey = (pixels @ np.array(LUMA, np.float32))[..., None]
    if form in ("black_and_white", "colourise"):
        return np.repeat(grey, 3, axis=2)
    if form in ("saturate", "desaturate"):
        factor = 1 + 0.9 * strength if form == "saturate" else 1 - 0.7 * min(1.0, strength)
        return grey + (pixels - grey) * np.float32(factor)
    if form in ("brighten", "darken"):
        stops = strength if form == "brighten" else -1.4 * strength
        return pixels * np.float32(2 ** (stops / GAMMA))
    push = 0.3 * strength if form == "warm" else -0.3 * strength
    gains = np.array([1 + push, 1.0, 1 - push], np.float32)
    gains /= float(gains @ np.array(LUMA, np.float32))  # keeps the brightness
    return pixels * gains ** (1 / GAMMA)
