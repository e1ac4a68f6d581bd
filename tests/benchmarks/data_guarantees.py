"""Measures what the filters find: planted near duplicates, pages of text, noise and flat images.

    apt-get install mate-backgrounds
    python tests/benchmarks/data_guarantees.py [near]

It takes seven minutes; with `near`, only the near duplicates are measured, in four.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_pipeline.selection.thresholds import Thresholds
from tests.data_pipeline import planted, real_images

PAGES, WORTHLESS = 400, 400
REPETITION, OPACITIES = 0.15, (0.5, 0.3, 0.15)
NO_DUPLICATES = Thresholds(drop_exact_duplicates=False, drop_near_duplicates=False)


def main() -> None:
    pictures = list(real_images.photographs(2, 800))
    print(f"near duplicates of {len(pictures)} photographs: recall, precision")
    for kind in real_images.COPIES:
        recall, precision = planted.near_duplicates(pictures, kind)
        print(f"  {kind:20s} {recall:6.1%} {precision:7.1%}", flush=True)
    tiles = [(f"{i:04d}", real_images.bytes_of(tile)) for i, tile in enumerate(real_images.photographs(4, 400))]
    selection = planted.select_files(tiles, Thresholds(min_side=64))
    joined = [key for key, why in selection.dropped.items() if why.step == "duplicates"]
    print(f"other scenes joined: {len(joined)} of {len(tiles)} tiles of photographs, none of which overlap: {joined}")
    if sys.argv[1:] == ["near"]:
        return
    clean = planted.repetitions(pictures, None)
    print(
        f"watermarks, above a repetition of {REPETITION} ({(clean > REPETITION).mean():.1%} of the clean pictures are)"
    )
    for kind in ("tiled", "middle", "corner"):
        shares = [(planted.repetitions(pictures, kind, opacity) > REPETITION).mean() for opacity in OPACITIES]
        print(f"  {kind:8s}", *(f"opacity {o}: {share:.1%}" for o, share in zip(OPACITIES, shares, strict=True)))
    selection = planted.select_files(planted.pages(PAGES), NO_DUPLICATES)
    print(f"pages of text kept: {len(selection.kept) / PAGES:.1%}; dropped: {_reasons(selection)}")
    selection = planted.select_files(planted.worthless(WORTHLESS), NO_DUPLICATES)
    print(f"noise and flat pictures dropped: {len(selection.dropped) / WORTHLESS:.1%} {_reasons(selection)}")
    print(f"  kept: {[kept.key for kept in selection.kept]}")


def _reasons(selection) -> dict:
    return dict(Counter(why.reason for why in selection.dropped.values()))


if __name__ == "__main__":
    main()
