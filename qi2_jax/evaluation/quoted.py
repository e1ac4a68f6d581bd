"""Published figures that are printed beside ours, and never mixed with them."""

from typing import NamedTuple

SOURCE = "Qwen-Image-2.0 report (arXiv 2605.10730), table 1"


class Quoted(NamedTuple):
    """One row: model, factor and latent channels, parameters in millions, and PSNR and SSIM on two sets of images."""

    model: str
    code: str
    encoder_millions: int
    decoder_millions: int
    imagenet_psnr: float
    imagenet_ssim: float
    text_psnr: float
    text_ssim: float


ROWS = (
    Quoted("SD-3.5", "f8c16", 34, 50, 31.22, 0.8839, 29.93, 0.9658),
    Quoted("Cosmos-CI8x8", "f8c16", 31, 46, 32.23, 0.9010, 30.62, 0.9664),
    Quoted("Wan2.1", "f8c16", 54, 73, 31.29, 0.8870, 26.77, 0.9386),
    Quoted("HunyuanVideo", "f8c16", 100, 146, 33.21, 0.9143, 32.83, 0.9773),
    Quoted("FLUX.1-dev", "f8c16", 34, 50, 32.84, 0.9155, 32.65, 0.9792),
    Quoted("Qwen-Image", "f8c16", 54, 73, 33.42, 0.9159, 36.63, 0.9839),
    Quoted("HunyuanImage-3.0", "f16c32", 389, 871, 31.08, 0.8655, 29.23, 0.9521),
    Quoted("Wan2.2", "f16c48", 150, 555, 31.30, 0.8784, 28.19, 0.9508),
    Quoted("Stepvideo-T2V", "f16c64", 110, 389, 31.54, 0.8973, 29.62, 0.9641),
    Quoted("Qwen-Image-2.0", "f16c64", 79, 259, 33.42, 0.9225, 32.81, 0.9795),
)
