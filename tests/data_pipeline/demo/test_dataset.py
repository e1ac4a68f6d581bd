import importlib.util
import itertools
import json
from collections import Counter

import imagehash
import pytest
from PIL import Image

from data_pipeline.buckets import Buckets
from data_pipeline.decoding.images import decode_image
from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.demo.images import PHOTOS, SIGNS
from data_pipeline.records.schema import INSTRUCTION, KINDS
from data_pipeline.samples.prepare import prepare_image
from qi2_jax.pixels import over_white


def test_captions_and_licences(demo):
    images, summary, _, _ = demo
    lines = (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[: len(summary.clean)]
    entries = [json.loads(line) for line in lines]
    assert {entry["file_name"] for entry in entries} == set(summary.clean)
    assert all(entry["licence"] and entry["captions"][0]["text"] for entry in entries)
    kinds = {caption["kind"] for entry in entries for caption in entry["captions"]}
    assert kinds == set(KINDS) - {INSTRUCTION}
    first = [entry["captions"][0]["text"] for entry in entries]
    assert len(set(first)) == len(first) == len(PHOTOS) + len(SIGNS) == 26


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.name)
def test_captions_of_signs_quote_their_words(sign):
    words = " ".join(line[0] for line in sign.lines).split()
    quoted = " ".join(sign.caption.split('"')[1::2]).split()
    assert quoted == words


def test_images_fill_many_buckets_and_look_different(demo):
    images, summary, _, _ = demo
    pictures = [decode_image((images / key).read_bytes()).image for key in summary.clean]
    report = Buckets.for_area(256).report(picture.size for picture in pictures)
    assert sum(report.counts.values()) == len(pictures)
    assert sum(count > 0 for count in report.counts.values()) == 9
    hashes = [imagehash.phash(over_white(picture)) for picture in pictures]
    assert min(one - other for one, other in itertools.combinations(hashes, 2)) >= 16


def test_turned_image_comes_out_upright(demo):
    images, _, _, _ = demo
    data = (images / "clean/pagoda.jpg").read_bytes()
    with Image.open(images / "clean/pagoda.jpg") as stored:
        assert stored.size == (417, 300)
    bucket = Buckets.for_area(256).assign(300, 417)
    pixels = prepare_image(decode_image(data).image, bucket).astype(int)
    assert pixels[:20].mean() > pixels[-20:].mean() + 50  # bright sky above dark trees


def test_formats_and_alpha_vary(demo):
    images, summary, _, _ = demo
    decoded = [decode_image((images / key).read_bytes()) for key in summary.clean]
    assert Counter(one.format for one in decoded).keys() == {"PNG", "JPEG"}
    assert {one.mode for one in decoded} == {"L", "RGB", "RGBA"}
    assert sum(one.image.mode == "RGBA" for one in decoded) == 2


def test_refuses_to_write_over_something(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        write_demo_folder(tmp_path)


def test_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'qi2\[demo\]'"):
        write_demo_folder(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
