"""Images of an evaluation: categories, crops, batches, and those that cannot be measured."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.samples.held_out import image_hash
from qi2_jax.evaluation.images import BATCH_PIXELS, ImageFolder, Item, category_of, in_batches
from tests.evaluation import inputs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return inputs.write_images(tmp_path_factory.mktemp("data"))


def read(folder, refused=None, **options):
    options = {"multiple": 16, "max_side": 1024} | options
    return list(ImageFolder(folder, **options).read(Tally() if refused is None else refused, "test"))


def test_subfolders_are_categories_and_broken_images_are_counted(pictures):
    refused = Tally()
    items = read(pictures, refused)
    assert [(item.name, item.category) for item in items] == [
        ("photo/a.png", "photo"),
        ("photo/b.png", "photo"),
        ("text/c.png", "text"),
    ]
    assert refused.counts == {"undecodable": 1, "too_small": 1}
    assert refused.examples["undecodable"] == ["photo/broken.png"]


def test_sides_are_cropped_about_the_center(pictures):
    first = read(pictures)[0]
    whole = np.asarray(Image.open(pictures / "photo/a.png"))
    np.testing.assert_array_equal(first.pixels, whole[4:36, 3:67])
    assert read(pictures, max_side=40)[0].pixels.shape == (32, 32, 3)
    assert {item.pixels.shape for item in read(pictures, side=48)} == {(48, 48, 3)}


def test_only_the_central_square_is_resized(tmp_path, monkeypatch):
    sizes, resize = [], Image.Image.resize

    def noted(image, size, *arguments, **options):
        sizes.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(250, 175), (64, 96), (48, 100), (40, 2000)]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        image.save(tmp_path / f"{number}.png")
        (item,) = read(tmp_path, side=48)
        scale = 48 / min(image.size)
        whole = resize(image, (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        left, top = (whole.width - 48) // 2, (whole.height - 48) // 2
        difference = np.abs(item.pixels.astype(int) - np.asarray(whole.crop((left, top, left + 48, top + 48))))
        assert difference.max() <= 1 and np.mean(difference > 0) < 0.01  # the box is in single precision
        (tmp_path / f"{number}.png").unlink()
    assert sizes == [(48, 48)] * 4


def test_held_out_records_are_those_that_training_leaves_out(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "image.png")
        records.append(Record(f"{number}", (tmp_path / "image.png").read_bytes(), (Caption("x"),), "test"))
    folder = tmp_path / "records"
    write_shards(folder, records, records_per_shard=3)
    held = [record.key for record in records if image_hash(record.image) < 0.5]
    assert 1 < len(held) < 7
    assert [item.name for item in read(folder, held_out=0.5)] == held
    others = [item.name for item in read(folder, held_out=0.5, is_training=True)]
    assert sorted(held + others) == [record.key for record in records]
    lowest = min(image_hash(record.image) for record in records)
    with pytest.raises(ValueError, match=r"no held-out image \(--held-out .*\) in .*records could be read"):
        read(folder, held_out=lowest)
    (tmp_path / "files").mkdir()
    with pytest.raises(ValueError, match=r"files has no records, from which --held-out 0.5 could choose"):
        read(tmp_path / "files", held_out=0.5)
    (tmp_path / "files/words.png").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"no image in .*files could be read; refused: {'unknown_format': 1}"):
        read(tmp_path / "files", held_out=0.5, is_training=True)


def test_records_say_what_is_text(tmp_path):
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    texts = {"general": Caption("a wall"), "text": Caption("it says wall", "text")}
    records = [
        Record("a", data, (texts["text"],), "test"),
        Record("b", data, (texts["general"],), "test", tags=("synthetic/text", "script/Latn")),
        Record("c", data, (texts["general"],), "test", tags=("photo/landscape",)),
        Record("d", b"not an image", (texts["general"],), "test"),
        Record("e", data, (texts["general"],), "test"),
    ]
    assert [category_of(record) for record in records] == ["text", "text", "photo", "test", "test"]
    write_shards(tmp_path / "records", records, records_per_shard=3)
    refused = Tally()
    assert [item.name for item in read(tmp_path / "records", refused)] == ["a", "b", "c", "e"]
    assert refused.counts == {"unknown_format": 1}


def test_transparent_images_are_over_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (item,) = read(tmp_path)
    assert (item.pixels == 255).all() and item.category == tmp_path.name


def test_batches_have_one_size_and_are_bounded():
    shapes = [(256, 256)] * 9 + [(512, 512)] + [(2048, 2048)] * 2
    items = [Item(str(index), "x", np.zeros((*shape, 3), np.uint8)) for index, shape in enumerate(shapes)]
    batches = list(in_batches(items))
    assert [len(batch) for batch in batches] == [8, 1, 1, 1, 1]
    assert all(len(batch) == 1 or sum(item.pixels[..., 0].size for item in batch) <= BATCH_PIXELS for batch in batches)
    small = Item("small", "x", np.zeros((64, 32, 3), np.uint8))
    assert [item.resolution for item in (items[0], items[9], items[10], small)] == ["256p", "512p", "2048p", "64p"]


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="missing is not a folder"):
        read(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"--side is 40; it must be a multiple of 16"):
        read(tmp_path, side=40)
    with pytest.raises(ValueError, match=r"--max-side is 8; the models need at least 16 pixels"):
        read(tmp_path, max_side=8)
