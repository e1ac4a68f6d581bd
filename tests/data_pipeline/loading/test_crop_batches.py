"""Batches of crops have exact shares of the kinds, and the whole state is the number of the step."""

import itertools
from collections import Counter

import numpy as np
import pytest

from data_pipeline.loading.crop_batches import CropStream, Phase, Phases
from data_pipeline.loading.crops import TextImage
from data_pipeline.loading.kinds import check_kinds, kind_of

COUNTS = 7, 5  # images of each kind
IMAGES = [TextImage(np.full((8, 8, 1), number, np.uint8)) for number in range(sum(COUNTS))]
OF_KIND = range(COUNTS[0]), range(COUNTS[0], sum(COUNTS))


def phases(rows=None):
    def phase(start, sizes, shares, frequencies, batch_size, seed):
        streams = tuple(
            tuple(
                CropStream(IMAGES, of_kind, size, seed + 4 * place + 2 * kind)
                for kind, of_kind in zip(range(len(shares)), OF_KIND, strict=False)
            )
            for place, size in enumerate(sizes)
        )
        chosen = None if rows is None else [row for row in range(batch_size) if row in rows]
        return Phase(start, streams, shares, frequencies, batch_size, seed, chosen)

    return Phases((phase(0, [(2, 2)], (1,), (1,), 4, 0), phase(5, [(2, 4), (4, 2)], (3, 1), (2, 1), 8, 1_000)))


def numbers(batch):
    return np.round((batch.pixels_BHWc[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def steps(start, count, rows=None):
    return list(itertools.islice(phases(rows).from_step(start), count))


def test_kinds_have_exact_shares_and_every_image_comes_once_per_epoch():
    batches = steps(0, 5 + 3 * 14)
    first = [number for batch in batches[:5] for number in numbers(batch)]
    assert sorted(first[:7]) == sorted(first[7:14]) == [*OF_KIND[0]]
    later = batches[5:]
    assert Counter(batch.pixels_BHWc.shape[1:3] for batch in later) == {(2, 4): 28, (4, 2): 14}
    for start in range(0, len(later), 3):  # a cycle of the sizes
        assert Counter(batch.pixels_BHWc.shape[1:3] for batch in later[start : start + 3]) == {(2, 4): 2, (4, 2): 1}
    for batch in later:
        assert Counter(batch.kinds) == {0: 6, 1: 2}
        assert all(number in OF_KIND[kind] for number, kind in zip(numbers(batch), batch.kinds, strict=True))
    for size in ((2, 4), (4, 2)):
        rows = [number for batch in later if batch.pixels_BHWc.shape[1:3] == size for number in numbers(batch)]
        for kind, count in zip(OF_KIND, COUNTS, strict=True):
            mine = [number for number in rows if number in kind]
            for start in range(0, len(mine) - count + 1, count):
                assert sorted(mine[start : start + count]) == [*kind]


@pytest.mark.parametrize("start", [0, 3, 5, 11])
def test_batches_depend_on_the_step_alone_on_any_number_of_hosts(start):
    whole = steps(0, start + 4)[start:]
    for rows in (range(0, 8, 2), range(1, 8, 2)):
        for batch, part in zip(whole, steps(start, 4, rows), strict=True):
            mine = [row for row in range(len(batch.kinds)) if row in rows]
            assert np.array_equal(part.pixels_BHWc, batch.pixels_BHWc[mine])
            assert part.kinds == tuple(batch.kinds[row] for row in mine)


GLYPHS = "synthetic/glyphs", "source/tiny"
KINDS = {"other": (), "synthetic": ("synthetic/",), "glyphs": GLYPHS, "pages": ("design/",)}


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([], "other"),
        (["nature/cat", "source/x"], "other"),
        (["synthetic/text"], "synthetic"),
        (["synthetic/glyphs"], "glyphs"),
        (["source/tiny-text"], "glyphs"),
        (["synthetic/text", "design/slide"], "synthetic"),  # the longer beginning
    ],
)
def test_the_longest_beginning_of_a_label_decides(labels, kind):
    check_kinds(KINDS)
    assert kind_of(labels, KINDS) == kind
    assert kind_of(labels, {name: prefixes for name, prefixes in KINDS.items() if prefixes}) == (
        None if kind == "other" else kind
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rest": ()}, "'other' and 'rest' both have images of no other kind"),
        ({"s": ("design/",)}, "'pages' and 's'"),
        ({"s": ("x", "x")}, "kind 's' has the beginning 'x' twice; leave one of them out"),
    ],
)
def test_a_label_belongs_to_one_kind(more, message):
    with pytest.raises(ValueError, match=message):
        check_kinds(KINDS | more)
