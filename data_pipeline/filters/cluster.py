"""Clusters: assigns each image to one of K groups of similar images, so that selection can cap every group.

Centroids are fitted once, by k-means on CLIP's unit vectors of some of the records, and stored with the scores:

    DIR/scores/cluster/centroids.safetensors     centroids: float32 [K, E]; metadata: digest of records and model
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.filters.alignment import embed_images, embed_upright, model_digest, no_model
from data_pipeline.filters.base import Candidate, Filter, Threshold
from data_pipeline.records.shards import RecordFolder
from qi2_jax.pixels import over_white
from qi2_jax.runtime.atomic import write_atomic

RECORDS_PER_CLUSTER = 256  # records per cluster for fitting the centroids
ITERATIONS = 25
_CHUNK_ROWS = 1 << 14  # vectors that are compared with all centroids at once; bounds the memory
_BATCH = 32


def fit_centroids(folder: Path | str, clip: Path | str, clusters: int) -> Path:
    """Fits centroids on a folder of records, unless they exist for the same records, model and number of clusters.

    Returns:
      Path of the centroids, for `with_centroids`.

    Raises:
      ValueError: if the folder has fewer decodable images than clusters, or either folder is not readable.
    """
    import safetensors.numpy

    records, clip = RecordFolder(folder), Path(clip).resolve()
    if not 2 <= clusters <= len(records):
        raise ValueError(f"clusters is {clusters}; choose between 2 and the {len(records)} records of {folder}")
    about = {"clip": model_digest(clip), "clusters": clusters, "shards": [shard.digest for shard in records.shards]}
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    path = Path(folder) / "scores/cluster/centroids.safetensors"
    if path.is_file() and _read(path)[1].get("fitted_on") == digest:
        return path
    drawn = np.random.default_rng(0).permutation(len(records))[: RECORDS_PER_CLUSTER * clusters]
    vectors = np.concatenate([*_embed(records, clip, np.sort(drawn))])
    if len(vectors) < clusters:
        raise ValueError(f"{folder}: {len(vectors)} images decode, too few for {clusters} clusters")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, safetensors.numpy.save({"centroids": kmeans(vectors, clusters)}, {"fitted_on": digest}))
    return path


def _embed(records: RecordFolder, clip: Path, drawn: Int64[np.ndarray, " n"]) -> Iterator[Float[np.ndarray, "b E"]]:
    for start in range(0, len(drawn), _BATCH):
        images = []
        for index in drawn[start : start + _BATCH]:
            try:
                images.append(over_white(decode_image(records[int(index)].image).image))
            except UndecodableImage:  # the filter `broken` counts it
                continue
        yield embed_upright(clip, images)


def kmeans(vectors: Float[np.ndarray, "n E"], clusters: int) -> Float[np.ndarray, "K E"]:
    """Unit-length centroids of spherical k-means (Dhillon and Modha, 2001), deterministic.

    Initial centroids are drawn far from each other (k-means++, seeded). An empty cluster gets the vector that fits its
    current centroid worst.

    Args:
      vectors: unit vectors, at least as many as clusters.
      clusters: number of clusters.
    """
    rng = np.random.default_rng(0)
    chosen = [int(rng.integers(len(vectors)))]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < clusters:
        distance = np.minimum(distance, np.clip(1 - vectors @ vectors[chosen[-1]], 0, None, dtype=np.float64))
        total = np.cumsum(distance)
        chosen.append(int(np.searchsorted(total, rng.random() * total[-1], side="right").clip(0, len(vectors) - 1)))
    centroids = vectors[chosen].astype(np.float32)
    before = np.full(len(vectors), -1)
    for _ in range(ITERATIONS):
        nearest, cosine = _nearest(vectors, centroids)
        if np.array_equal(nearest, before):
            break
        before = nearest
        counts = np.bincount(nearest, minlength=clusters)
        worst = iter(np.argsort(cosine, kind="stable"))
        sums = np.zeros(centroids.shape, np.float64)
        np.add.at(sums, nearest, vectors)
        for empty in np.flatnonzero(counts == 0):
            sums[empty] = vectors[next(worst)]
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centroids).astype(np.float32)
    return centroids


def _nearest(
    vectors: Float[np.ndarray, "n E"], centroids: Float[np.ndarray, "K E"]
) -> tuple[Int64[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """For every vector, the index of the nearest centroid (the lowest of several) and the cosine with it."""
    nearest, cosine = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        cosines = vectors[part] @ centroids.T
        nearest[part], cosine[part] = cosines.argmax(axis=1), cosines.max(axis=1)
    return nearest, cosine


def with_centroids(filter: Filter, clip: Path | str, path: Path | str) -> Filter:
    """Returns the filter with a CLIP from a folder and centroids from a file.

    Raises:
      ValueError: if either cannot be read, or their widths differ.
    """
    clip, path = Path(clip).resolve(), Path(path).resolve()
    centroids, about = _read(path)
    width = embed_images(clip, ()).shape[1]
    if centroids.shape[1] != width:
        raise ValueError(f"{path} has centroids of width {centroids.shape[1]}; {clip} has embeddings of width {width}")
    digest = hashlib.sha256((model_digest(clip) + str(about)).encode() + centroids.tobytes()).hexdigest()
    return replace(filter, model=digest, score=functools.partial(score, clip, path))


def score(clip: Path, path: Path, candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `CLUSTER` for each candidate."""
    nearest, cosine = _nearest(embed_images(clip, candidates), _read(path)[0])
    return [{"id": int(i), "cosine": round(float(x), 4)} for i, x in zip(nearest, cosine, strict=True)]


@functools.lru_cache(maxsize=1)
def _cached(path: Path, changed: int) -> tuple[np.ndarray, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return file.get_tensor("centroids").astype(np.float32), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} contains no centroids: {error}") from None


def _read(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file of centroids; fit them first")
    return _cached(path, path.stat().st_mtime_ns)


CLUSTER = Filter(
    name="cluster",
    version=2,
    columns={
        "id": (int, "index 0..K-1 of the nearest centroid"),
        "cosine": (float, "cosine of the image with its centroid"),
    },
    score=no_model,
    thresholds=(
        Threshold(
            "max_per_cluster",
            0,
            "records kept per cluster, drawn by the hash of their keys; 0: all",
            low=0,
            high=1 << 62,
            reason="cluster_is_full",
        ),
    ),
    optional=True,
    on_device=True,
    needs="score with --clip FOLDER and --clusters K",
)
