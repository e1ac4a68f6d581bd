"""Shared by the tests of the data pipeline: small images, and the demo set, which is written and ingested once."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.sources.ingest import ingest


@pytest.fixture(scope="session")
def picture():
    """picture(seed, size): a smooth random colour image, different for every seed."""

    def make(seed: int = 0, size: tuple[int, int] = (300, 280)) -> Image.Image:
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        return coarse.resize(size, Image.Resampling.BICUBIC)

    return make


@pytest.fixture(scope="session")
def encoded():
    """encoded(image, format, **options): the bytes of an image file."""

    def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """(folder of images, its summary, folder of records in four shards, ingest report). Read-only."""
    root = tmp_path_factory.mktemp("demo")
    summary = write_demo_folder(root / "images")
    report = ingest(root / "images", root / "records", records_per_shard=10, progress=False)
    return root / "images", summary, root / "records", report
