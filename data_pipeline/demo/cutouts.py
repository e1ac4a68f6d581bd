"""Drawn cut-outs for edits of objects: transparent PNG files, each with a text file of English and Chinese names."""

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 192  # pixels
# File name: (English name, Chinese name, fill, outline, corners of a polygon in the unit square; none for an ellipse).
_STAR = [
    (0.5 + r * math.sin(a), 0.5 - r * math.cos(a))
    for i in range(10)
    for r, a in [(0.48 if i % 2 == 0 else 0.2, i * math.pi / 5)]
]
OBJECTS: dict[str, tuple[str, str, str, str, list[tuple[float, float]]]] = {
    "ball": ("A red ball", "一个红球", "#d5352c", "#7c1a14", []),
    "star": ("A yellow star", "一颗黄色星星", "#f6c945", "#a87d12", _STAR),
    "kite": ("A green kite", "一只绿色风筝", "#3fae62", "#1d5c31", [(0.5, 0.02), (0.9, 0.4), (0.5, 0.98), (0.1, 0.4)]),
    "tent": ("A blue tent", "一顶蓝色帐篷", "#3b6fd1", "#1c3a75", [(0.5, 0.1), (0.97, 0.9), (0.03, 0.9)]),
    "crate": ("A brown crate", "一个棕色箱子", "#9a6a3a", "#54371b", [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)]),
    "boat": (
        "A purple boat",
        "一艘紫色小船",
        "#8a4fb8",
        "#47265f",
        [(0.02, 0.5), (0.98, 0.5), (0.78, 0.85), (0.2, 0.85)],
    ),
}


def write_cutouts(folder: Path) -> None:
    """Writes the objects; existing files are overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (english, chinese, fill, outline, corners) in OBJECTS.items():
        large = 4 * SIDE  # drawn large, then reduced, for smooth edges
        image = Image.new("RGBA", (large, large), (0, 0, 0, 0))
        draw = ImageDraw.Draw(image)
        if corners:
            draw.polygon([(x * large, y * large) for x, y in corners], fill, outline, width=24)
        else:
            draw.ellipse((large * 0.04, large * 0.04, large * 0.96, large * 0.96), fill, outline, width=24)
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{english}.\nzh_CN.utf8={chinese}。\n", encoding="utf-8")
