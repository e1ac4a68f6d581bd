"""Digests of selected images do not change, because runs compare them when they resume."""

from types import SimpleNamespace

from data_pipeline.buckets import Bucket
from data_pipeline.loading.crops import SelectedImage, SelectedImages


def test_digest_of_selected_images_stays_the_same():
    image = SelectedImage(3, Bucket(64, 96), (0, 2))
    assert repr(image) == "Picture(index=3, bucket=Bucket(width=64, height=96), captions=(0, 2))"
    records = SimpleNamespace(shards=[SimpleNamespace(digest="a"), SimpleNamespace(digest="b")])
    assert (
        SelectedImages(records, (image,), 4).digest
        == "d67e113a1da6e0184a89f8287cbc680d6c4157ed90f1d36111c9324bbda4609f"
    )
