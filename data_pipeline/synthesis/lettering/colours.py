"""Named colours for captions, and which of them are readable on a background."""

import numpy as np

from data_pipeline.synthesis.lettering.typesetting import Colour

COLOURS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "ivory": (252, 248, 232),
    "light grey": (224, 226, 230),
    "pale yellow": (255, 244, 190),
    "pale blue": (214, 232, 250),
    "pale green": (216, 240, 216),
    "pale pink": (252, 222, 228),
    "lavender": (228, 220, 246),
    "yellow": (250, 208, 50),
    "orange": (240, 130, 30),
    "red": (206, 38, 40),
    "dark red": (120, 16, 28),
    "pink": (236, 110, 150),
    "purple": (98, 46, 140),
    "blue": (32, 92, 200),
    "dark blue": (18, 36, 96),
    "turquoise": (28, 160, 165),
    "green": (28, 132, 64),
    "dark green": (14, 66, 40),
    "brown": (112, 66, 34),
    "grey": (110, 114, 120),
    "dark grey": (52, 55, 60),
    "black": (14, 14, 16),
}
MIN_CONTRAST = 4.5  # for normal text, WCAG 2.2 level AA
MIN_CONTRAST_LARGE = 3.0  # for large text and graphics, WCAG 2.2 level AA


def luminance(colour: Colour) -> float:
    """Relative luminance of an sRGB colour, 0..1 (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: Colour, b: Colour) -> float:
    """Contrast ratio of two colours, 1..21 (WCAG 2.2)."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def choose(rng: np.random.Generator, names: tuple[str, ...] = tuple(COLOURS)) -> str:
    """The name of a random colour."""
    return names[rng.integers(len(names))]


def readable_on(rng: np.random.Generator, *grounds: Colour, least: float = MIN_CONTRAST) -> str:
    """The name of a random colour that is readable on all given backgrounds; black or white if there is none."""
    names = [name for name, rgb in COLOURS.items() if all(contrast(rgb, ground) >= least for ground in grounds)]
    if not names:
        return max(("black", "white"), key=lambda name: min(contrast(COLOURS[name], ground) for ground in grounds))
    return names[rng.integers(len(names))]
