"""Edits of objects: inserted, removed, recoloured, placed on another background, or combined from several sources."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipeline.records.schema import Caption
from data_pipeline.synthesis.edits.compositing import MAX_ENLARGED, Placement, composite
from data_pipeline.synthesis.edits.cutouts import Cutout, Unsuitable
from data_pipeline.synthesis.edits.edit import (
    Edit,
    Ingredients,
    describe_position,
    random_placement,
    random_slant,
    shrink_scene,
)
from data_pipeline.synthesis.edits.scenes import Scene
from data_pipeline.synthesis.edits.wordings import instructions

SHARE = (0.25, 0.6)  # range of an object's size, relative to the size of the image
MIN_CONTRAST = 16  # mean difference that the object makes in its box, in levels of 255
MIN_COLOUR = 0.3  # length of the mean hue vector, weighted by saturation times brightness
MIN_ONE_COLOUR = 0.93  # this length over the mean weight; 1 if all hues are equal
MAX_CAPTION_WORDS = 40  # words in the description of a background
COLOURS = {
    "red": ("红色", 0, 0.0),
    "orange": ("橙色", 30, 0.6),
    "yellow": ("黄色", 56, 0.6),
    "green": ("绿色", 120, 0.0),
    "blue": ("蓝色", 220, 0.0),
    "purple": ("紫色", 280, 0.0),
    "pink": ("粉色", 325, 0.7),
}  # Chinese name, hue in degrees, and the brightness 0..1 below which the colour has another name (dark orange: brown)
PLAIN = {
    "white": ("白色", (255, 255, 255)),
    "light grey": ("浅灰色", (214, 214, 214)),
    "black": ("黑色", (18, 18, 18)),
    "beige": ("米色", (236, 224, 200)),
    "light blue": ("浅蓝色", (183, 212, 238)),
    "dark green": ("深绿色", (28, 74, 48)),
}


def insertion(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """A scene -> the scene with an object."""
    scene, cutout, placement, target = _object_in_scene(ingredients, rng)
    wordings = _instructions("insertion", rng, cutout, describe_position(placement, scene.image.size))
    return Edit((scene.stored or scene.image,), target, wordings, ("edit/local", "edit/insertion"), (scene, cutout))


def removal(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """The inverse of an insertion."""
    scene, cutout, placement, source = _object_in_scene(ingredients, rng)
    wordings = _instructions("removal", rng, cutout, describe_position(placement, scene.image.size))
    return Edit((source,), scene.stored or scene.image, wordings, ("edit/local", "edit/removal"), (scene, cutout))


def hue(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """An object in a scene -> the object in another colour."""
    scene, cutout, placement, source = _object_in_scene(
        ingredients, rng, lambda drawn: None if _hue(drawn) else "cutout_without_hue"
    )
    degrees_before, bright = _hue(cutout) or (0.0, 0.0)
    far = [
        name
        for name, (_, degrees, least) in COLOURS.items()
        if abs((degrees - degrees_before + 180) % 360 - 180) >= 60 and bright >= least
    ]
    name = far[int(rng.integers(len(far)))]
    chinese, degrees, _ = COLOURS[name]
    target = composite(scene.image, _rotate_hue(cutout.image, degrees - degrees_before), placement)
    wordings = _instructions("hue", rng, cutout, describe_position(placement, scene.image.size), colour=(name, chinese))
    return Edit((source,), target, wordings, ("edit/local", "edit/hue"), (scene, cutout))


def background(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """An object in a scene -> the object on a background that is plain, described, or from a second source."""
    form = ("plain", "described", "source")[int(rng.integers(3))]
    scene, cutout, placement, source = _object_in_scene(ingredients, rng)
    size = scene.image.size
    tags = ("edit/background", f"edit/background/{form}")
    if form == "plain":
        name = list(PLAIN)[int(rng.integers(len(PLAIN)))]
        chinese, rgb = PLAIN[name]
        target = composite(Image.new("RGB", size, rgb), cutout.image, placement)
        wordings = _instructions("background/plain", rng, cutout, ("", ""), colour=(name, chinese))
        return Edit((source,), target, wordings, tags, (scene, cutout))
    other = ingredients.scene(rng)
    if other.name == scene.name:
        raise Unsuitable("scene_drawn_twice")
    captions = {language: _short_caption(other.captions, language) for language in ("en", "zh")}
    if form == "described" and captions["en"]:
        target = composite(_as_background(other, size).image, cutout.image, placement)
        wordings = _instructions(
            "background/described", rng, cutout, ("", ""), caption=(captions["en"], captions["zh"])
        )
        return Edit((source,), target, wordings, tags, (scene, cutout, other))
    tags = ("edit/background", "edit/background/source")
    other = _as_background(other, size)
    target = composite(other.image, cutout.image, placement)
    first, second = (int(number) for number in rng.permutation(2) + 1)
    ordered = dict(sorted({first: source, second: other.stored or other.image}.items()))
    numbers = {"first": (first, first), "second": (second, second)}
    wordings = _instructions("background/source", rng, cutout, ("", ""), **numbers)
    return Edit(tuple(ordered.values()), target, wordings, tags, (scene, cutout, other))


def compose2(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """Two sources -> an object of one in the scene of the other."""
    scene, cutout, placement, target = _object_in_scene(ingredients, rng)
    first, at = (int(number) for number in rng.permutation(2) + 1)
    alone, parts = _source_with_object(ingredients, rng, cutout, scene)
    ordered = dict(sorted({first: alone, at: scene.stored or scene.image}.items()))
    numbers = {"first": (first, first), "scene": (at, at)}
    wordings = _instructions("compose/2", rng, cutout, describe_position(placement, scene.image.size), **numbers)
    return Edit(tuple(ordered.values()), target, wordings, ("edit/compose", "edit/compose/2"), (scene, cutout, *parts))


def compose3(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """Three sources -> the objects of two side by side in the scene of the third."""
    cutout = ingredients.cutout(rng)
    other = ingredients.cutout(rng, lambda drawn: "cutout_drawn_twice" if drawn.english == cutout.english else None)
    scene = shrink_scene(ingredients.scene(rng), cutout, other, share=SHARE[0])
    size = scene.image.size
    halves = [(0.0, 0.5), (0.5, 1.0)]
    rng.shuffle(halves)
    light = random_slant(rng)  # the same for both
    spots = [
        Placement(spot.width, spot.height, spot.left, spot.top, light)
        for spot in (
            random_placement(rng, size, one, share=SHARE, across=half)
            for one, half in zip((cutout, other), halves, strict=True)
        )
    ]
    target = scene.image
    for one, spot in sorted(zip((cutout, other), spots, strict=True), key=lambda pair: pair[1].box[3]):
        target = _composite_visibly(target, one, spot)  # objects farther down are nearer
    first, second, at = (int(number) for number in rng.permutation(3) + 1)
    alone, parts = _source_with_object(ingredients, rng, cutout, scene)
    other_alone, more = _source_with_object(ingredients, rng, other, scene)
    ordered = dict(sorted({first: alone, second: other_alone, at: scene.stored or scene.image}.items()))
    other_where = describe_position(spots[1], size)
    fields = {
        "first": (first, first),
        "second": (second, second),
        "scene": (at, at),
        "other": (other.definite, other.bare_chinese if other.chinese else None),
        "other_where": other_where,
    }
    wordings = _instructions("compose/3", rng, cutout, describe_position(spots[0], size), **fields)
    tags = ("edit/compose", "edit/compose/3")
    return Edit(tuple(ordered.values()), target, wordings, tags, (scene, cutout, other, *parts, *more))


def _object_in_scene(
    ingredients: Ingredients, rng: np.random.Generator, suits: Callable[[Cutout], str | None] = lambda _: None
) -> tuple[Scene, Cutout, Placement, Image.Image]:
    """A scene, an object, its placement, and the scene with the object."""
    cutout = ingredients.cutout(rng, suits)
    scene = shrink_scene(ingredients.scene(rng), cutout, share=SHARE[0])
    placement = random_placement(rng, scene.image.size, cutout, share=SHARE)
    return scene, cutout, placement, _composite_visibly(scene.image, cutout, placement)


def _composite_visibly(scene: Image.Image, cutout: Cutout, placement: Placement) -> Image.Image:
    """`composite`, but raises Unsuitable if the object hardly differs from the background."""
    shown = composite(scene, cutout.image, placement)
    before, after = (np.asarray(image.crop(placement.box), np.float32) for image in (scene, shown))
    if float(np.abs(before - after).mean()) < MIN_CONTRAST:
        raise Unsuitable("object_hardly_seen")
    return shown


def _source_with_object(
    ingredients: Ingredients, rng: np.random.Generator, cutout: Cutout, goal: Scene
) -> tuple[Image.Image, tuple[Scene, ...]]:
    """An image of the object: alone on a white background, or in a scene other than `goal`."""
    if rng.random() < 0.5:
        side = max(256, round(1.25 * max(cutout.image.size)))
        white = Image.new("RGB", (side, side), "white")
        width, height = cutout.image.size
        spot = Placement(width, height, (side - width) // 2, (side - height) // 2, 0.0)
        return composite(white, cutout.image, spot, shadow=False), ()
    scene = shrink_scene(ingredients.scene(rng), cutout, share=0.4)
    if scene.name == goal.name:
        raise Unsuitable("scene_drawn_twice")
    return _composite_visibly(scene.image, cutout, random_placement(rng, scene.image.size, cutout, share=(0.4, 0.7))), (
        scene,
    )


def _as_background(scene: Scene, size: tuple[int, int]) -> Scene:
    """The scene, cropped and scaled to a size as a background."""
    if max(size[0] / scene.image.width, size[1] / scene.image.height) > MAX_ENLARGED:
        raise Unsuitable("background_too_small")
    return scene.resized(size)


def _instructions(
    kind: str, rng: np.random.Generator, cutout: Cutout, at: tuple[str, str], **fields: tuple
) -> tuple[Caption, ...]:
    """Instructions with the object's names; `fields` are pairs of English and Chinese."""
    english = {"object": cutout.definite, "an_object": cutout.english, "where": at[0]}
    english |= {name: pair[0] for name, pair in fields.items()}
    if cutout.chinese is None or any(pair[1] is None for pair in fields.values()):
        return instructions(kind, rng, english, None)
    chinese = {"object": cutout.bare_chinese, "an_object": cutout.chinese, "where": at[1]}
    return instructions(kind, rng, english, chinese | {name: pair[1] for name, pair in fields.items()})


def _short_caption(captions: tuple[Caption, ...], language: str) -> str | None:
    for caption in captions:
        words = caption.text.split() if language == "en" else caption.text
        limit = MAX_CAPTION_WORDS if language == "en" else 3 * MAX_CAPTION_WORDS
        if (caption.language or "").startswith(language) and caption.kind == "general" and len(words) <= limit:
            return caption.text
    return None


def _hue(cutout: Cutout) -> tuple[float, float] | None:
    """Hue in degrees and brightness 0..1 of the object's dominant colour; None if no colour dominates."""
    pixels = np.asarray(cutout.image.convert("RGB").convert("HSV"), np.float32)[np.asarray(cutout.image)[..., 3] > 128]
    weights = pixels[:, 1] * pixels[:, 2] / 255**2
    angles = pixels[:, 0] * (2 * np.pi / 255)
    mean = complex(np.sum(weights * np.cos(angles)), np.sum(weights * np.sin(angles))) / len(pixels)
    if abs(mean) < max(MIN_COLOUR, MIN_ONE_COLOUR * float(weights.mean())):
        return None
    return float(np.degrees(np.angle(mean)) % 360), float(np.average(pixels[:, 2], weights=weights)) / 255


def _rotate_hue(cutout: Image.Image, degrees: float) -> Image.Image:
    """Rotates all hues; perceived brightness hardly changes."""
    hsv = np.asarray(cutout.convert("RGB").convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(np.float32) + degrees * 255 / 360).round().astype(np.int32) % 256
    turned = Image.fromarray(hsv, "HSV").convert("RGB")
    turned.putalpha(cutout.getchannel("A"))
    return turned
