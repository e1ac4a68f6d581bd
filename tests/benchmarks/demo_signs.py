"""What the images of a finished demo show: `python -m tests.benchmarks.demo_signs RUN`.

The demo has signs, whose captions quote what stands on them. For every sign this prints how alike this text is to what
OCR reads in the original, in the autoencoder's reconstruction and in the transformer's sample: 1 - edit distance /
length of the longer text, without white space. The figure of the originals is the limit of the engine.

For all images it prints the PSNR of the reconstructions over all pixels (RGB over white), and how sharp the samples are
beside the reconstructions: the ratios of the energy of gradients, and of the variance of the Laplacian, in luminance.
1 means equally sharp.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy.ndimage import laplace

from data_pipeline.buckets import Bucket
from data_pipeline.loading.crops import SelectedImage, SelectedImages
from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.cache import Cache
from data_pipeline.selection.index import INDEX, read_selection
from qi2_jax import sharding
from qi2_jax.config import recorded
from qi2_jax.evaluation.ocr import Engine, similarity
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.pixels import over_white
from qi2_jax.runs import paths

SIGN = "sign-"  # beginning of the file names of signs


@dataclasses.dataclass
class Shown:
    """An image of the demo in its three forms, in RGB over white.

    Attributes:
      captions: captions that the demo trains on.
      samples: an image for each caption.
    """

    name: str
    captions: list[str]
    original: np.ndarray
    rebuilt: np.ndarray
    samples: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """What the sign says, as its caption quotes it."""
        return "".join(re.findall('"([^"]*)"', self.captions[0]))


def read(run: Path) -> list[Shown]:
    """The demo's images; samples are drawn again as the demo drew them."""
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    pipeline = Pipeline.load(run / paths.TRANSFORMER, dtype=jnp.float32, mesh=mesh)
    job, records = recorded.read(run / paths.JOB), RecordFolder(run / "records")
    latents = {sample.record: sample.latents for stream in Cache(run / paths.SAMPLES).streams for sample in stream}
    shown = []
    for kept in read_selection(run / "records" / INDEX):
        h, w, _ = latents[kept.index].shape
        chosen = SelectedImage(
            kept.index, Bucket(w * pipeline.vae.config.factor, h * pipeline.vae.config.factor), kept.captions
        )
        images = SelectedImages(records, (chosen,), job["data"]["channels"])
        captions = [caption.text for caption in images.captions(0)]
        shown.append(Shown(images.record(0).key, captions, _rgb(images[0]), _rgb(pipeline.decode(latents[kept.index]))))
    pairs = [(caption, image) for image in shown for caption in image.captions]
    sizes = [(image.original.shape[1], image.original.shape[0]) for _, image in pairs]
    options = {key: job["sample"][key] for key in ("batch_size", "steps", "seed")}
    drawn = pipeline.in_batches([caption for caption, _ in pairs], sizes=sizes, **options)
    for (_, image), sample in zip(pairs, drawn, strict=True):
        image.samples.append(_rgb(sample))
    return shown


def _rgb(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(over_white(Image.fromarray(pixels)))


def gradient_energy(pixels: np.ndarray) -> float:
    """Mean squared difference of neighbours in luminance, 0..1."""
    grey = _luminance(pixels)
    return float(np.mean(np.diff(grey, axis=0) ** 2) + np.mean(np.diff(grey, axis=1) ** 2))


def laplacian_variance(pixels: np.ndarray) -> float:
    return float(np.var(laplace(_luminance(pixels))))


def _luminance(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114]) / 255


def psnr_over_all_pixels(shown: list[Shown]) -> float:
    squared = [((image.original / 255 - image.rebuilt / 255) ** 2).ravel() for image in shown]
    return float(10 * np.log10(1 / np.concatenate(squared).mean()))


def show_signs(signs: list[Shown], engine: Engine) -> None:
    """Prints what OCR reads on every sign, and the means."""
    print(f"\n{engine.name}\n{'sign':22} {'pixels':>8} {'original':>9} {'rebuilt':>9} {'sample':>9}  text -> read as")
    scores = []
    for sign in signs:
        text = _joined(sign.text)
        texts = [_joined(engine(pixels)) for pixels in (sign.original, sign.rebuilt, sign.samples[0])]
        scores.append([similarity(text, found) for found in texts])
        cells = " ".join(f"{score:9.3f}" for score in scores[-1])
        height, width, _ = sign.original.shape
        print(f"{Path(sign.name).name:22} {f'{width}x{height}':>8} {cells}  {text} -> {texts}")
    print(f"{'mean':31} {' '.join(f'{score:9.3f}' for score in np.mean(scores, axis=0))}")


def _joined(text: str) -> str:
    return "".join(text.split())


def show_sharpness(shown: list[Shown]) -> None:
    """Prints the sharpness of every sample beside its reconstruction, and of all together."""
    measures: tuple[Callable[[np.ndarray], float], ...] = (gradient_energy, laplacian_variance)
    print(f"\n{'sharpness, sample / rebuilt':34} {'gradients':>10} {'Laplacian':>10}")
    ratios, sums = [], []
    for image in shown:
        rebuilt, original = ([measure(pixels) for measure in measures] for pixels in (image.rebuilt, image.original))
        for sample in image.samples:
            values = [measure(sample) for measure in measures]
            ratios.append(np.divide(values, rebuilt))
            sums.append((values, rebuilt, original))
            print(f"{Path(image.name).name:34} {ratios[-1][0]:10.3f} {ratios[-1][1]:10.3f}")
    sample, rebuilt, original = np.sum(sums, axis=0)
    rows = {
        "geometric mean": np.exp(np.log(ratios).mean(axis=0)),
        "sum of all samples / of rebuilt": sample / rebuilt,
        "sum of all rebuilt / of originals": rebuilt / original,
    }
    for title, values in rows.items():
        print(f"{title:34} {values[0]:10.3f} {values[1]:10.3f}")


def main(run: Path) -> None:
    engine, shown = Engine(), read(run)
    print(f"PSNR over all pixels of {len(shown)} reconstructions: {psnr_over_all_pixels(shown):.2f} dB")
    show_signs([image for image in shown if Path(image.name).name.startswith(SIGN)], engine)
    show_sharpness(shown)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
