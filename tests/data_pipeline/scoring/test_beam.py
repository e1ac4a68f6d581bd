"""Scoring on Apache Beam gives the bytes of the local executor."""

import importlib
import json
import sys

import pytest

from data_pipeline.filters import CASCADE
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.cli import main


def files(folder) -> dict[str, bytes]:
    found = (folder / "scores").rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


@pytest.fixture
def folders(tmp_path, picture, encoded):
    """Two equal folders of pairs, copies, edits and a broken file, in five shards."""
    images = [picture(seed, (60, 48)) for seed in range(6)]
    caption, turn = Caption("a picture for a test"), Caption("make it another picture", "instruction")
    records = [Record(f"p{i}", encoded(image), (caption,), "s") for i, image in enumerate(images)]
    records += [Record(f"q{i}", encoded(image.resize((56, 45))), (caption,), "s") for i, image in enumerate(images[:3])]
    records += [Record("same", encoded(images[4]), (caption,), "s"), Record("broken", b"x", (caption,), "s")]
    for name, sizes in (("e0", (60, 48)), ("e1", (58, 46)), ("e2", (58, 46))):
        sources = tuple(encoded(images[i].resize(sizes)) for i in (1, 2))
        records.append(Record(name, encoded(images[0].resize(sizes)), (turn,), "s", conditions=sources))
    for name in ("local", "beam"):
        write_shards(tmp_path / name, records, records_per_shard=3)
    return tmp_path / "local", tmp_path / "beam"


def test_all_files_and_the_selection_are_those_of_the_local_executor(folders, monkeypatch):
    from data_pipeline.scoring import beam

    local, remote = folders
    expected = score(local, workers=1, progress=False)
    monkeypatch.setattr(beam, "ENTRIES_PER_PARTITION", 64)
    monkeypatch.setattr(beam, "_GROUP", 5)
    report = beam.score_with_beam(str(remote), "DirectRunner")
    assert report == expected and report.pairs.near == 4
    assert files(remote) == files(local)
    thresholds = Thresholds(min_side=30)
    assert select(remote, thresholds) == select(local, thresholds)
    assert {"q0", "q1", "q2", "same", "e1", "e2"} <= set(select(local, thresholds).dropped)

    (remote / "scores/entropy/records-00001-of-00005.parquet").unlink()
    (remote / "scores/pairs/done.json").write_text("{")
    again = beam.score_with_beam(str(remote), "DirectRunner")
    assert again.scored == dict.fromkeys(again.scored, 0) | {"entropy": 3} and again.pairs == report.pairs
    assert files(remote) == files(local)
    main.main(["data", "score", str(remote), "--runner", "DirectRunner", "--json", str(remote / "figures.json")])
    assert json.loads((remote / "figures.json").read_text())["pairs"] is None


def test_user_errors(folders, tmp_path):
    from data_pipeline.scoring.beam import score_with_beam

    with pytest.raises(ValueError, match="runner is 'PrismRunner'; choose one of"):
        score_with_beam(str(folders[0]), "PrismRunner")
    with pytest.raises(ValueError, match=r"manifest.json does not exist"):
        score_with_beam(str(tmp_path / "absent"), "DirectRunner")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "data_pipeline.scoring.beam", raising=False)
    with pytest.raises(ValueError, match="pip install 'apache-beam"):
        importlib.import_module("data_pipeline.scoring.beam")
    assert CASCADE
