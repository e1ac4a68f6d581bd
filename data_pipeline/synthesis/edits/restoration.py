"""Restoration: the source is a degraded image, the target is the original."""

import io

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageFilter

from data_pipeline.decoding.images import decode_image
from data_pipeline.synthesis.edits.cutouts import Unsuitable
from data_pipeline.synthesis.edits.edit import Edit, Ingredients
from data_pipeline.synthesis.edits.wordings import instructions

MIN_CHANGE = 2.0  # mean difference in levels of 255; degradations hardly show in flat or blurred images
FORMS = ("noise", "blur", "jpeg", "rain", "low_light")


def restoration(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """A degraded image -> the original."""
    form = FORMS[int(rng.integers(len(FORMS)))]
    scene = ingredients.scene(rng)
    source: Image.Image | bytes
    if form == "jpeg":  # stored as the JPEG file itself
        buffer = io.BytesIO()
        scene.image.save(buffer, "JPEG", quality=int(rng.integers(8, 28)))
        source = buffer.getvalue()
    elif form == "blur":
        source = blurred(scene.image, rng)
    else:
        pixels = np.asarray(scene.image, np.float32) / 255
        degraded = {"noise": noisy, "rain": rainy, "low_light": dark}[form](pixels, rng)
        source = Image.fromarray((degraded.clip(0, 1) * 255).round().astype(np.uint8))
    seen = decode_image(source).image if isinstance(source, bytes) else source
    if float(np.abs(np.asarray(seen, np.float32) - np.asarray(scene.image)).mean()) < MIN_CHANGE:
        raise Unsuitable("picture_hardly_changes")
    wordings = instructions(f"restoration/{form}", rng, {}, {})
    tags = ("edit/global", "edit/restoration", f"edit/restoration/{form}")
    return Edit((source,), scene.stored or scene.image, wordings, tags, (scene,))


def noisy(pixels: Float[np.ndarray, "H W 3"], rng: np.random.Generator) -> Float[np.ndarray, "H W 3"]:
    """Adds sensor noise: a variance that grows with the light, plus read noise (Foi et al., IEEE TIP 2008)."""
    gain, read = rng.uniform(0.004, 0.02), rng.uniform(0.02, 0.06)
    deviation = np.sqrt(gain * pixels + read**2, dtype=np.float32)
    return pixels + deviation * rng.standard_normal(pixels.shape, np.float32)


def blurred(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blurs as defocus or linear motion does, in proportion to the size of the image."""
    reach = max(image.size) * rng.uniform(0.004, 0.01)
    if rng.random() < 0.5:
        return image.filter(ImageFilter.GaussianBlur(max(1.5, 0.6 * reach)))
    angle, steps = rng.uniform(0, np.pi), max(5, round(3 * reach))
    total = np.zeros((image.height, image.width, 3), np.float32)
    pad = steps
    wide = np.pad(np.asarray(image, np.float32), ((pad, pad), (pad, pad), (0, 0)), "edge")
    for step in range(steps):
        offset = step - (steps - 1) / 2
        down, right = pad + round(offset * np.sin(angle)), pad + round(offset * np.cos(angle))
        total += wide[down : down + image.height, right : right + image.width]
    return Image.fromarray((total / steps).round().astype(np.uint8))


def rainy(pixels: Float[np.ndarray, "H W 3"], rng: np.random.Generator) -> Float[np.ndarray, "H W 3"]:
    """Adds bright streaks in one direction at two distances, and slight haze."""
    H, W, _ = pixels.shape
    angle = rng.uniform(-0.35, 0.35)
    light = np.zeros((H, W), np.float32)
    for size, share, strength in ((1.0, 0.0016, 0.5), (0.5, 0.004, 0.3)):
        length = max(9, round(size * max(H, W) * rng.uniform(0.025, 0.05)))
        drops = rng.random((H + 2 * length, W + 2 * length)) < share
        width = max(1, round(size * max(H, W) / 500))
        drops = np.maximum.reduce([np.roll(drops, column, axis=1) for column in range(width)]).astype(np.float32)
        streak = np.zeros((H, W), np.float32)
        for step in range(length):
            down, right = length // 2 + step, length + round((step - length / 2) * np.tan(angle))
            weight = np.sin(np.pi * (step + 0.5) / length)
            streak = np.maximum(streak, np.float32(weight) * drops[down : down + H, right : right + W])
        soft = Image.fromarray((streak * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.4 + 0.3 * width))
        light += np.float32(strength / 255) * np.asarray(soft, np.float32)
    haze = rng.uniform(0.03, 0.12)
    hazy = pixels * np.float32(1 - haze) + np.float32(0.75 * haze)
    return hazy + (np.float32(0.95) - hazy) * np.minimum(light, 0.8)[..., None]


def dark(pixels: Float[np.ndarray, "H W 3"], rng: np.random.Generator) -> Float[np.ndarray, "H W 3"]:
    """Reduces the light by 2 to 3.5 stops and adds the noise of such an exposure."""
    linear = pixels ** np.float32(2.2) * np.float32(2 ** -rng.uniform(2.0, 3.5))
    deviation = np.sqrt(0.0006 * linear + 0.0015**2, dtype=np.float32)
    return np.maximum(linear + deviation * rng.standard_normal(pixels.shape, np.float32), 0) ** np.float32(1 / 2.2)
