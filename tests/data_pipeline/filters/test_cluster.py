import json
import shutil

import numpy as np
import pytest

from data_pipeline import filters
from data_pipeline.filters.cluster import CLUSTER, fit_centroids, kmeans
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from tests.data_pipeline.filters.test_alignment import clip, records  # noqa: F401  # fixtures


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_kmeans_finds_groups_of_unequal_size():
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(5, 16)))
    of = np.repeat(np.arange(5), (200, 100, 30, 20, 10))
    vectors = unit(centres[of] + 0.01 * rng.normal(size=(len(of), 16)))
    found = kmeans(vectors, 5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    nearest = (vectors @ found.T).argmax(axis=1)
    assert len(set(zip(of, nearest, strict=True))) == 5
    np.testing.assert_array_equal(found, kmeans(vectors, 5))


def test_kmeans_of_fewer_different_vectors_than_clusters():
    found = kmeans(np.repeat(np.eye(2, 8, dtype=np.float32), 5, axis=0), 4)
    assert found.shape == (4, 8) and np.isfinite(found).all()


def test_clusters_are_scored_and_capped(clip, records):  # noqa: F811
    centroids = fit_centroids(records, clip, 2)
    before = centroids.read_bytes()
    chosen = filters.cascade(clip, None, centroids)
    score(records, filters=chosen, workers=1, progress=False)
    ids = {row["key"]: row["cluster.id"] for row in read_scores(records, filters.CASCADE)}
    assert ids.pop("broken") is None and set(ids.values()) == {0, 1}
    asked = {"min_side": 30, "drop_near_duplicates": False, "drop_exact_duplicates": False}
    everything, capped = (select(records, Thresholds(**asked, max_per_cluster=limit)) for limit in (0, 1))
    assert sorted(ids[key] for key in capped.keys) == [0, 1]
    full = {key for key, why in capped.dropped.items() if why.reason == "cluster_is_full"}
    assert full | set(capped.keys) == set(everything.keys)

    assert fit_centroids(records, clip, 2) == centroids and centroids.read_bytes() == before
    assert set(score(records, filters=chosen, workers=1, progress=False).scored.values()) == {0}
    fit_centroids(records, clip, 3)
    again = score(records, filters=filters.cascade(clip, None, centroids), workers=1, progress=False).scored
    assert again["cluster"] == len(ids) + 1 and again["alignment"] == 0


def test_what_cannot_be_clustered_is_refused(clip, records, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"clusters is 1; choose between 2 and"):
        fit_centroids(records, clip, 1)
    score(records, filters=[f for f in filters.CASCADE if f.name != "nsfw"], workers=1, progress=False)
    with pytest.raises(ValueError, match=f"max_per_cluster requires clusters, which were not scored: {CLUSTER.needs}"):
        select(records, Thresholds(max_per_cluster=1))
    (tmp_path / "centroids.safetensors").write_bytes(b"nothing")
    for path in (tmp_path / "absent", tmp_path / "centroids.safetensors"):
        with pytest.raises(ValueError, match="centroids"):
            filters.cascade(clip, None, path)
    with pytest.raises(ValueError, match="so --clip FOLDER is required"):
        filters.cascade(None, None, tmp_path / "absent")
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip/config.json").write_text(
        json.dumps(json.loads((clip / "config.json").read_text()) | {"note": "other"})
    )
    assert fit_centroids(records, clip, 2).read_bytes() != fit_centroids(records, tmp_path / "clip", 2).read_bytes()
