"""PSNR and SSIM equal scikit-image's, and MS-SSIM its formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import convolve2d
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from qi2_jax.evaluation import pixel_metrics

STATED = {"channel_axis": -1, "data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def pair(seed: int, height: int, width: int, noise: float = 20) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image and a noisy version of it."""
    rng = np.random.default_rng(seed)
    y, x = (places[..., None] for places in np.mgrid[:height, :width])
    image = 127 + 100 * np.sin(y / 9 + rng.uniform(0, 6, 3)) * np.cos(x / 7)
    noisy = image + rng.normal(0, noise, image.shape)
    return image.astype(np.uint8), np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(11, 11), (16, 48), (33, 47)])
def test_psnr_and_ssim_equal_scikit_image(size):
    a, b = pair(0, *size)
    error = pixel_metrics.mean_squared_error(a, b)
    assert error == pytest.approx(mean_squared_error(a, b), rel=1e-12)
    assert pixel_metrics.psnr(error) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-12)
    assert pixel_metrics.ssim(a, b) == pytest.approx(structural_similarity(a, b, **STATED), abs=1e-9)


def test_ms_ssim_equals_its_formula():
    """One channel at a time, with plain convolutions."""
    a, b = pair(1, 177, 180, noise=60)
    window = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(window, window) / window.sum() ** 2
    smooth = lambda x: convolve2d(x, window, mode="valid")
    found = []
    for channel in range(3):
        x, y, product = a[..., channel].astype(float), b[..., channel].astype(float), 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mean_x, mean_y = smooth(x), smooth(y)
            contrast = (2 * (smooth(x * y) - mean_x * mean_y) + 58.5225) / (
                smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2 + 58.5225
            )
            luminance = (2 * mean_x * mean_y + 6.5025) / (mean_x**2 + mean_y**2 + 6.5025)
            product *= np.mean(contrast * luminance if scale == 4 else contrast) ** weight
            x, y = (
                sum(z[i : z.shape[0] // 2 * 2 : 2, j : z.shape[1] // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)) / 4
                for z in (x, y)
            )
        found.append(product)
    assert pixel_metrics.ms_ssim(a, b) == pytest.approx(np.mean(found), abs=1e-9)
    assert 0.5 < np.mean(found) < 0.99


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(11, 40), st.integers(11, 40))
def test_equal_images_are_perfect_and_order_does_not_matter(seed, height, width):
    a, b = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), np.uint8)
    assert pixel_metrics.psnr(pixel_metrics.mean_squared_error(a, a)) == float("inf")
    assert pixel_metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert pixel_metrics.mean_squared_error(a, b) == pixel_metrics.mean_squared_error(b, a)
    assert pixel_metrics.ssim(a, b) == pytest.approx(pixel_metrics.ssim(b, a), abs=1e-12)
    assert pixel_metrics.ssim(a, b) < 1


def test_ms_ssim_of_equal_and_of_inverted_images():
    a, b = pair(2, 176, 176)
    assert pixel_metrics.ms_ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert pixel_metrics.ms_ssim(a, b) == pytest.approx(pixel_metrics.ms_ssim(b, a), abs=1e-12)
    assert pixel_metrics.ms_ssim(a, 255 - a) == 0  # negative means count as 0 instead of NaN


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match=r"10 x 40 pixels; both sides must be at least 11"):
        pixel_metrics.ssim(*pair(3, 40, 10))
    with pytest.raises(ValueError, match="both sides must be at least 176"):
        pixel_metrics.ms_ssim(*pair(3, 175, 200))
