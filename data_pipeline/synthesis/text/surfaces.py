"""A flat sheet in an image: the window in which it is placed, its perspective, material and light."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from data_pipeline.synthesis.lettering.typesetting import Box, Colour

SUPERSAMPLING = 2  # factor for warping a sheet, for smooth edges
_LUMA = np.asarray([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601, as in Pillow's grey levels
_GRAIN = {  # per material: blurs of white noise along y and x, which are summed, and the amplitude in grey levels
    "paper": (((1.0, 1.0),), 1.5),
    "wooden board": (((1.0, 40.0),), 12.0),
    "painted sign": (((12.0, 12.0),), 2.5),
    "fabric banner": (((0.0, 2.0), (2.0, 0.0)), 4.0),
}


@dataclass(frozen=True)
class Window:
    """A part of an image, in pixels.

    Attributes:
      roughness: standard deviation of the grey levels after a slight blur.
    """

    left: int
    top: int
    width: int
    height: int
    roughness: float

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def grown(self, margin: int, size: tuple[int, int]) -> "Window":
        """The window with a margin around it, clipped to an image of (width, height) pixels."""
        left, top = max(0, self.left - margin), max(0, self.top - margin)
        right, bottom = min(size[0], self.left + self.width + margin), min(size[1], self.top + self.height + margin)
        return Window(left, top, right - left, bottom - top, self.roughness)

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


@dataclass(frozen=True)
class Light:
    """The effect of an image's light and sharpness on a sheet in it.

    Attributes:
      shade: factor for the sheet's colours, from the image's blurred brightness and tint.
      texture: detail of the surface relative to its blurred brightness, a factor around 1.
      blur: standard deviation in pixels of the blur that makes drawn edges as soft as those of the image.
      noise: standard deviation of the image's noise in grey levels.
    """

    shade: Float[np.ndarray, "H W 3"]
    texture: Float[np.ndarray, "H W 1"]
    blur: float
    noise: float


def luma(pixels: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W"]:
    """Luma, 0..255."""
    return pixels @ _LUMA


def find_window(rng: np.random.Generator, grey: Float[np.ndarray, "H W"]) -> Window:
    """One of the five smoothest windows, at random, in a grid of windows of a random size."""
    H, W = grey.shape
    width, height = int(W * rng.uniform(0.4, 0.64)), int(H * rng.uniform(0.32, 0.52))
    blurred = ndimage.gaussian_filter(grey, 1.5)
    windows = [
        Window(left, top, width, height, float(blurred[top : top + height, left : left + width].std()))
        for top in np.linspace(0.02 * H, 0.98 * H - height, 7).astype(int).tolist()
        for left in np.linspace(0.02 * W, 0.98 * W - width, 7).astype(int).tolist()
    ]
    windows.sort(key=lambda window: (window.roughness, window.top, window.left))
    return windows[int(rng.integers(5))]


def make_sheet(rng: np.random.Generator, material: str, colour: Colour, size: tuple[int, int]) -> Image.Image:
    """A sheet of (width, height) pixels with the grain of its material, one of `on_surface.SHEETS`."""
    blurs, strength = _GRAIN[material]
    noise = rng.normal(0.0, 1.0, (size[1], size[0])).astype(np.float32)
    grain = sum(ndimage.gaussian_filter(noise, blur) for blur in blurs)
    grain = grain / (grain.std() + 1e-6) * strength
    pixels = np.asarray(colour, dtype=np.float32) + grain[..., None]
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def perspective(rng: np.random.Generator, size: tuple[int, int], window: Window) -> Float[np.ndarray, "4 2"]:
    """Corners of a randomly rotated sheet in a window, seen by a pinhole camera; clockwise from the top left."""
    width, height = size
    yaw, pitch, roll = np.radians([rng.uniform(-36, 36), rng.uniform(-24, 24), rng.uniform(-7, 7)])
    corners = np.asarray([(-width, -height, 0), (width, -height, 0), (width, height, 0), (-width, height, 0)]) / 2
    cos, sin = np.cos, np.sin
    about_x = np.asarray([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]])
    about_y = np.asarray([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]])
    about_z = np.asarray([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    turned = corners @ (about_z @ about_y @ about_x).T
    distance = 1.8 * max(width, height)  # of the camera; near enough for a visible perspective
    seen = turned[:, :2] * (distance / (distance + turned[:, 2:]))
    low, high = seen.min(0), seen.max(0)
    scale = min(window.width / (high[0] - low[0]), window.height / (high[1] - low[1]))
    return (seen - (low + high) / 2) * scale + np.asarray(window.centre)


def homography(corners: Float[np.ndarray, "4 2"], size: tuple[int, int]) -> tuple[float, ...]:
    """The coefficients a..h of the mapping from points of the image to points of a sheet of (width, height) pixels.

    (x, y) -> ((a x + b y + c) / (g x + h y + 1), (d x + e y + f) / (g x + h y + 1)), as in Pillow's PERSPECTIVE.
    """
    width, height = size
    rows, right = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (width, 0), (width, height), (0, height)), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return tuple(float(value) for value in np.linalg.solve(np.asarray(rows), np.asarray(right)))


def warped_box(box: Box, corners: Float[np.ndarray, "4 2"], size: tuple[int, int]) -> Box:
    """The smallest box (left, top, right, bottom) of whole pixels around a part of a sheet in the image.

    Args:
      box: part of the sheet.
      corners: corners of the sheet in the image.
      size: width and height of the sheet.
    """
    to_sheet = np.append(homography(corners, size), 1.0).reshape(3, 3)
    left, top, right, bottom = box
    points = np.asarray([(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)], float)
    seen = points @ np.linalg.inv(to_sheet).T
    places = seen[:, :2] / seen[:, 2:]
    low, high = np.floor(places.min(0)), np.ceil(places.max(0))
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def warp(
    sheet: Image.Image, corners: Float[np.ndarray, "4 2"], size: tuple[int, int], outside: Colour | int
) -> Float[np.ndarray, "H W *channels"]:
    """Warps a sheet to given corners.

    Args:
      sheet: image of the sheet.
      corners: corners in the result, clockwise from the top left.
      size: width and height of the result.
      outside: colour of the pixels outside the sheet.

    Returns:
      float32 [H, W] or [H, W, 3], 0..255.
    """
    large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    coefficients = homography(corners * SUPERSAMPLING, sheet.size)
    warped = sheet.transform(
        large, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC, fillcolor=outside
    )
    return np.asarray(warped.reduce(SUPERSAMPLING), dtype=np.float32)


def estimate_light(pixels: Float[np.ndarray, "H W 3"], window: Window) -> Light:
    """Estimates the light in a window of an image with values 0..255; the result has the size of the window."""
    grey = luma(pixels)
    inside = grey[window.slices]
    smooth = _smooth(grey, max(4.0, min(window.width, window.height) / 6))[window.slices]
    level = max(float(inside.mean()), 8.0)
    # A white sheet in dim surroundings is dim, but always legible.
    exposure = float(np.clip(0.55 + 0.5 * level / 255, 0.6, 1.0))
    tint = 1 + 0.25 * (np.clip(pixels[window.slices].reshape(-1, 3).mean(0) / level, 0.6, 1.4) - 1)
    shade = np.clip(exposure * np.clip(smooth / level, 0.72, 1.22), 0.45, 1.08)[..., None] * tint
    texture = np.clip((inside + 12) / (smooth + 12), 0.75, 1.25)[..., None]
    return Light(shade.astype(np.float32), texture.astype(np.float32), _blur(grey), _noise(grey))


def _smooth(grey: Float[np.ndarray, "H W"], sigma: float) -> Float[np.ndarray, "H W"]:
    """A wide Gaussian blur, computed on a smaller image, since the result has no fine detail."""
    factor = max(1, int(sigma / 4))
    small = ndimage.gaussian_filter(np.asarray(Image.fromarray(grey).reduce(factor)), sigma / factor)
    return np.asarray(Image.fromarray(small).resize(grey.shape[::-1], Image.Resampling.BILINEAR))


def _blur(grey: Float[np.ndarray, "H W"]) -> float:
    """Blur of edges in pixels, 0.35..1.2. In a sharp image, the steepest gradients equal the local contrast."""
    steep = float(np.percentile(np.abs(np.diff(grey, axis=1)), 99.5))
    around = float(np.percentile(ndimage.maximum_filter(grey, 7) - ndimage.minimum_filter(grey, 7), 99.5))
    return float(np.clip(1.2 - steep / max(around, 1.0), 0.35, 1.2))


def _noise(grey: Float[np.ndarray, "H W"]) -> float:
    """Noise in grey levels, at most 6, from the smoothest tenth of all blocks of 16 x 16 pixels."""
    detail = np.abs(grey - ndimage.gaussian_filter(grey, 1.0))
    H, W = (side // 16 * 16 for side in detail.shape)
    blocks = detail[:H, :W].reshape(H // 16, 16, W // 16, 16).mean((1, 3))
    return min(float(np.percentile(blocks, 10)) * 1.25, 6.0)  # 1.25: from mean deviation to standard deviation
