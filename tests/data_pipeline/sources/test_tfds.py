"""Data sets of tensorflow-datasets: the stored bytes, class names and texts of a split become records."""

import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources import Options
from data_pipeline.sources.ingest import ingest

NAME = "tiny/small/1.0.0"


def picture(seed: int, format: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


FILES = [picture(i, "JPEG" if i % 2 else "PNG") for i in range(5)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Five examples as tensorflow-datasets writes them."""
    root = tmp_path_factory.mktemp("tfds")
    features = tfds.features

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Tiny."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small")]  # noqa: RUF012  # its interface
        pkg_dir_path, code_path = root, None

        def _info(self):
            kinds = {
                "image": features.Image(),
                "label": features.ClassLabel(names=["cat", "dog"]),
                "caption": features.Text(),
                "captions": features.Sequence(features.Text()),
                "sources": features.Sequence(features.Image()),
                "how": features.Text(),
                "objects": features.Sequence({"kind": features.ClassLabel(names=["a", "b"]), "x": np.float32}),
            }
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds), disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, data in enumerate(FILES):
                yield (
                    i,
                    {
                        "image": io.BytesIO(data),
                        "label": i % 2 if i != 4 else -1,
                        "caption": f"caption {i}" if i != 3 else " ",
                        "captions": [f"one {i}", f"two {i}"],
                        "sources": [io.BytesIO(FILES[j]) for j in range(i)],
                        "how": f"change {i}" if i else "",
                        "objects": [{"kind": kind, "x": 0.5} for kind in (1, 0, 1)],
                    },
                )

    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return root


def read(out, data_dir, name="tiny/small", split="train", **options):
    report = ingest(f"tfds:{name}", out, Options(data_dir=data_dir, split=split, **options), progress=False)
    return list(RecordFolder(out)), report.refused.counts


def test_stored_images_texts_and_class_names(tmp_path, data_dir):
    columns = {"text": "caption", "tags": "label"}
    records, refused = read(tmp_path, data_dir, columns=columns, licence="CC0")
    assert records == [
        Record(f"{NAME}/train/{i:08d}", FILES[i], (Caption(f"caption {i}"),), "tiny", "CC0", tags=tags)
        for i, tags in ((0, ("cat",)), (1, ("dog",)), (2, ("cat",)), (4, ()))
    ]
    assert refused == {"missing_caption": 1}
    assert "tensorflow" not in sys.modules


def test_sequences_edits_and_parts_of_a_split(tmp_path, data_dir):
    columns = {"conditions": "sources", "instruction": "how", "tags": "objects/kind"}
    records, refused = read(tmp_path, data_dir, name="tiny/small:1.0.0", split="train[:3]", columns=columns, source="s")
    assert refused == {}
    assert [record.conditions for record in records] == [(), (FILES[0],), (FILES[0], FILES[1])]
    captions = (Caption("change 2", "instruction"), Caption("one 2"), Caption("two 2"))
    assert records[2] == Record(
        f"{NAME}/train[:3]/00000002", FILES[2], captions, "s", None, (FILES[0], FILES[1]), ("b", "a")
    )
    assert refused == {}


def test_missing_data_sets_splits_and_columns_are_named(tmp_path, data_dir):
    for options, words in (
        ({"name": "tiny/absent"}, "no prepared data set 'tiny/absent'"),
        ({"name": "mnist"}, "no prepared data set 'mnist'"),
        ({"name": "tiny/small:2.0.0"}, "no prepared data set"),
        ({"split": "test"}, r"has the splits \['train'\]; 'test' cannot be read"),
        ({"columns": {"text": "absent"}}, "lacks.*absent"),
        ({"columns": {"text": "objects/x"}}, "lacks.*objects/x"),
    ):
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "out", data_dir, **options)
    assert not (tmp_path / "out").exists()


def test_hostile_data_sets_are_counted(tmp_path, data_dir):
    import shutil

    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    copied = shutil.copytree(data_dir, tmp_path / "copy")
    (path,) = copied.rglob("*.array_record*")
    reader = ArrayRecordReader(str(path))
    payloads = [reader.read([i])[0] for i in range(5)]
    payloads[1] = b"no example"
    payloads[2] = b"x" * 300_000_000
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    columns = {"text": "caption"}
    records, refused = read(tmp_path / "out", copied, columns=columns, max_image_bytes=20_000_000)
    assert [record.image for record in records] == [FILES[0], FILES[4]]
    assert refused == {"bad_metadata": 1, "too_large": 1, "missing_caption": 1}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read|broken_file"):
        read(tmp_path / "cut", copied, columns=columns)
    info = copied / NAME / "features.json"
    info.write_text(json.dumps({"no": "features"}))
    with pytest.raises(ValueError, match="tiny"):
        read(tmp_path / "none", copied, columns=columns)


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
        read(tmp_path, tmp_path)
