"""Metrics that compare the 8-bit pixels of two images: PSNR, SSIM and MS-SSIM.

All use the range 0..255 and fp64. SSIM (Wang et al. 2004) has a Gaussian window of 11 x 11 pixels with standard
deviation 1.5 and covariances divided by the number of pixels. Windows that reach beyond the image are left out, and
the mean is over positions and channels. MS-SSIM (Wang et al. 2003) repeats it at five scales, halved by averaging
2 x 2 pixels.

Dims: `H` `W` pixels, `h` `w` positions of a window, `c` image channels.
"""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

RANGE = 255.0
SIGMA, RADIUS = 1.5, 5  # of the Gaussian window, in pixels
K1, K2 = 0.01, 0.03  # constants of SSIM
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, full resolution first
MIN_SIDE = 2 * RADIUS + 1  # pixels: a smaller image has no whole window
MIN_SIDE_MULTISCALE = MIN_SIDE << (len(SCALE_WEIGHTS) - 1)

_WINDOW = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
_WINDOW /= _WINDOW.sum()

Pixels = UInt8[np.ndarray, "H W c"]


def mean_squared_error(a: Pixels, b: Pixels) -> float:
    """Mean over pixels and channels of the squared difference, in units of 8-bit levels."""
    return float(np.mean((a.astype(np.float64) - b) ** 2))


def psnr(mean_squared: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; infinite if it is 0."""
    return float("inf") if mean_squared == 0 else float(10 * np.log10(RANGE**2 / mean_squared))


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity; 1 if the images are equal.

    Raises:
      ValueError: if a side is below `MIN_SIDE`.
    """
    _check_size(a, MIN_SIDE)
    luminance, contrast = _terms(a.astype(np.float64), b.astype(np.float64))
    return float(np.mean(luminance * contrast))


def ms_ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity at five scales; 1 if the images are equal.

    The product over scales is taken per channel, before the mean over channels. A negative mean counts as 0, since its
    power would not be real.

    Raises:
      ValueError: if a side is below `MIN_SIDE_MULTISCALE`.
    """
    _check_size(a, MIN_SIDE_MULTISCALE)
    x, y = a.astype(np.float64), b.astype(np.float64)
    result = np.ones(a.shape[-1])
    for scale, weight in enumerate(SCALE_WEIGHTS, start=1):
        luminance, contrast = _terms(x, y)
        values = contrast if scale < len(SCALE_WEIGHTS) else luminance * contrast
        result *= np.maximum(values.mean(axis=(0, 1)), 0) ** weight
        x, y = _halve(x), _halve(y)
    return float(result.mean())


def _check_size(pixels: Pixels, side: int) -> None:
    if min(pixels.shape[:2]) < side:
        raise ValueError(f"images are {pixels.shape[1]} x {pixels.shape[0]} pixels; both sides must be at least {side}")


def _terms(
    x: Float[np.ndarray, "H W c"], y: Float[np.ndarray, "H W c"]
) -> tuple[Float[np.ndarray, "h w c"], Float[np.ndarray, "h w c"]]:
    """The two factors of SSIM at every window: that of the means, and that of contrast and structure."""
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance = _smooth(x * x) - mean_x**2 + _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (variance + c2)


def _smooth(x: Float[np.ndarray, "H W c"]) -> Float[np.ndarray, "h w c"]:
    """Mean of every whole window, weighted by the Gaussian."""
    for axis in (0, 1):
        x = correlate1d(x, _WINDOW, axis=axis, mode="reflect")
    return x[RADIUS:-RADIUS, RADIUS:-RADIUS]


def _halve(x: Float[np.ndarray, "H W c"]) -> Float[np.ndarray, "h w c"]:
    """Means of 2 x 2 pixels; an odd last row or column is dropped."""
    H, W, channels = x.shape
    return x[: H // 2 * 2, : W // 2 * 2].reshape(H // 2, 2, W // 2, 2, channels).mean(axis=(1, 3))
