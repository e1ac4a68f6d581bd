"""Crops and digests of selected images do not change, because runs that resume draw and compare them again."""

import dataclasses
from types import SimpleNamespace

import grain
import numpy as np
import pytest

from data_pipeline.buckets import Bucket
from data_pipeline.loading.crop_batches import CropStream, Phase, Phases
from data_pipeline.loading.crops import SelectedImage, SelectedImages, TextImage
from qi2_jax.pixels import normalize
from qi2_jax.workflows.config import load_experiment


def test_digest_of_selected_images_stays_the_same():
    image = SelectedImage(3, Bucket(64, 96), (0, 2))
    assert repr(image) == "Picture(index=3, bucket=Bucket(width=64, height=96), captions=(0, 2))"
    records = SimpleNamespace(shards=[SimpleNamespace(digest="a"), SimpleNamespace(digest="b")])
    assert (
        SelectedImages(records, (image,), 4).digest
        == "d67e113a1da6e0184a89f8287cbc680d6c4157ed90f1d36111c9324bbda4609f"
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    opaque = [rng.integers(0, 256, (40, 48, 4), dtype=np.uint8) for _ in range(3)]
    for image in opaque:
        image[..., 3] = 255
    return opaque


def stream(images, size=(32, 32), indices=None, **options):
    texts = [TextImage(image) if isinstance(image, np.ndarray) else image for image in images]
    return CropStream(texts, range(len(texts)) if indices is None else indices, size, **{"seed": 0, **options})


def first(images, rows=None, **options):
    phase = Phase(0, ((stream(images, **options),),), (1,), (1,), 12, 0, rows)
    return next(Phases((phase,)).from_step(0)).pixels_BHWc


def test_mattes_make_a_share_of_the_crops_partly_transparent(images):
    plain, some = first(images), first(images, mattes=0.5)
    assert (plain[..., 3] == 1).all() and np.array_equal(some, first(images, mattes=0.5))
    changed = (some[..., 3] < 1).any((1, 2))
    assert 2 < changed.sum() < 10 and np.array_equal(some[~changed], plain[~changed])
    every = first(images, mattes=1.0)
    alpha = every[..., 3]
    assert ((alpha.min((1, 2)) == -1) & (alpha.max((1, 2)) == 1)).all() and ((alpha > -1) & (alpha < 1)).any()
    assert np.array_equal(every[alpha > -1][:, :3], plain[alpha > -1][:, :3])
    assert (every[alpha == -1][:, :3] == 1).all()  # white, as `prepare_image` leaves transparent pixels
    assert first(images, mattes=0.5, rows=[3, 5]).tolist() == some[[3, 5]].tolist()


def test_crops_of_earlier_versions_are_drawn_again(images):
    rng = np.random.default_rng(1)
    top, left = (int(rng.integers(0, size - 31)) for size in (40, 48))
    mirrored = rng.random() < 0.5
    expected = images[0][top : top + 32, left : left + 32]
    found = stream(images)._crop(0, np.random.default_rng(1))
    assert np.array_equal(found, normalize(expected[:, ::-1] if mirrored else expected))


def test_batches_of_earlier_versions_are_drawn_again(images):
    """One phase, size and kind: rows follow the order of a single shuffled stream."""
    order = grain.MapDataset.range(3).seed(0).shuffle().repeat()
    crops = order.random_map(stream(images)._crop, seed=1)
    phase = Phase(0, ((stream(images),),), (1,), (1,), 12, 0, [1, 5])
    batches = Phases((phase,)).from_step(2)
    for step in (2, 3):
        assert np.array_equal(next(batches).pixels_BHWc, np.stack([crops[12 * step + row] for row in (1, 5)]))


def test_an_autoencoder_that_returns_other_channels_than_it_reads_is_refused():
    config = load_experiment("experiments/demo.py:tiny").vae
    with pytest.raises(ValueError, match=r"model\.in_channels is 4 and model\.out_channels 3; .*both the same number"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, out_channels=3))


@pytest.mark.parametrize(("mattes", "channels"), [(1.5, 4), (-0.1, 4), (0.5, 3)])
def test_mattes_need_an_autoencoder_of_rgba_images(mattes, channels):
    config = load_experiment("experiments/demo.py:tiny").vae
    with pytest.raises(ValueError, match=rf"mattes is {mattes}; .*four channels instead of {channels}"):
        dataclasses.replace(config, mattes=mattes, model=dataclasses.replace(config.model, in_channels=channels))
