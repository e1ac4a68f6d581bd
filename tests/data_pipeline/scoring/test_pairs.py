"""Near duplicates: the search finds the same groups as comparing every record with every other."""

import base64
import hashlib
import itertools
import json
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from data_pipeline.filters.duplicates import DUPLICATES, THUMBNAIL
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import read_manifest, write_shards
from data_pipeline.scoring import candidates as proposing
from data_pipeline.scoring import pair_search
from data_pipeline.scoring.candidates import BANDS, MAX_DISTANCE, MAX_GRADIENT, candidates, make_entries, partition
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.near_groups import group_near
from data_pipeline.scoring.pair_scores import read_pairs
from data_pipeline.scoring.pair_search import Contents, score_pairs
from data_pipeline.scoring.pairs import FINGERPRINT, compare_thumbnails
from data_pipeline.scoring.score_tables import write_scores
from data_pipeline.scoring.windows import WINDOWS
from data_pipeline.selection.index import Kept
from data_pipeline.selection.select import _duplicates, select
from data_pipeline.selection.thresholds import Thresholds

HASHES = st.integers(0, 2**64 - 1)
FLIPS = st.lists(st.integers(0, 63), max_size=10, unique=True).map(lambda places: sum(1 << place for place in places))


WITHOUT_WINDOWS = 0x5555555555555555  # far from the hashes of the tests


def found(phash: list[int], dhash: list[int], kind: list[int], parts: int) -> list[tuple[int, int]]:
    columns = [np.array(values, np.uint64) for values in (kind, phash, dhash)]
    windows = np.full((len(phash), len(WINDOWS)), WITHOUT_WINDOWS, np.uint64) ^ columns[1][:, None]
    pairs = set()
    for band in BANDS:
        entries = make_entries(band, np.arange(len(phash)), *columns, windows)
        place = partition(entries, parts)
        for part in range(parts):
            proposed = candidates(band, entries[place == part])
            assert len(np.unique(proposed)) == len(proposed)
            pairs |= {(int(pair["left"]), int(pair["right"])) for pair in proposed}
    return sorted(pairs)


@settings(max_examples=80, deadline=None)
@given(HASHES, HASHES, st.lists(st.tuples(FLIPS, FLIPS, st.sampled_from([0, 0, 7])), min_size=2, max_size=12))
def test_every_pair_of_a_small_group_is_proposed_by_any_partition(phash, dhash, changes):
    p, d, kind = ([phash ^ a for a, _, _ in changes], [dhash ^ b for _, b, _ in changes], [k for _, _, k in changes])
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(p)), 2)
        if kind[i] == kind[j]
        and ((p[i] ^ p[j]).bit_count() <= MAX_DISTANCE or (d[i] ^ d[j]).bit_count() <= MAX_GRADIENT)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposing, "MAX_LINKS", 12)
        assert found(p, d, kind, 1) == found(p, d, kind, 3) == expected


def rows_of(choices) -> list[dict]:
    """Score rows with few different hashes and thumbnails, so that near pairs of all kinds occur."""
    rows = []
    for number, (hashes, shades, edit, bits, same) in enumerate(choices):
        pictures = 2 if edit else 1
        cells = b"".join(np.full(THUMBNAIL, 100, np.uint8).tobytes()[: -len(s)] + bytes(s) for s in shades[:pictures])
        digest = hashlib.sha256(str(same if same < 3 else number).encode()).hexdigest()
        rows.append(
            {
                "bytes_sha256": hashlib.sha256(str(same if same < 2 else number).encode()).hexdigest(),
                "pixels_sha256": digest,
                "phash": "".join(f"{phash:016x}" for phash, _ in hashes[:pictures]),
                "dhash": "".join(f"{dhash:016x}" for _, dhash in hashes[:pictures]),
                "thumbnail": base64.b64encode(cells).decode(),
                "edit": f"{edit:064x}" if edit else None,
                "edit_pixels": "".join(f"{shade[0]:016x}" for shade in shades[:pictures]) if edit else None,
                "bits": bits,
            }
        )
    return rows


def all_pairs(keys: list[str], rows: list[dict], thresholds: Thresholds) -> dict[str, tuple[str, str]]:
    """The reference: compares every record with every other, and merges groups one by one."""
    left = sorted(range(len(rows)), key=lambda i: keys[i])
    drops = {}

    def near(one: dict, other: dict) -> bool:
        if one["edit"] != other["edit"] or min(one["bits"], other["bits"]) < thresholds.near_min_entropy:
            return False
        names = ("phash", "dhash", "thumbnail", "edit_pixels")
        if all(one[name] == other[name] for name in names):
            return True
        count = len(one["phash"]) // 16
        if one["edit"]:
            places = [slice(16 * i, 16 * i + 16) for i in range(count)]
            equal = [one["edit_pixels"][place] == other["edit_pixels"][place] for place in places]
            if any(equal) and not all(equal):
                return False
        distance, gradient = (
            max(
                (int(one[name][16 * i : 16 * i + 16], 16) ^ int(other[name][16 * i : 16 * i + 16], 16)).bit_count()
                for i in range(count)
            )
            for name in ("phash", "dhash")
        )
        cells = [np.frombuffer(base64.b64decode(row["thumbnail"]), np.uint8).reshape(count, -1) for row in (one, other)]
        worst = max(compare_thumbnails(*cells, np.full(count, distance <= MAX_DISTANCE))[0])
        return worst <= thresholds.near_difference and (
            distance <= thresholds.near_distance or gradient <= thresholds.near_gradient
        )

    for reason, same in (
        ("same_bytes", lambda a, b: a["bytes_sha256"] == b["bytes_sha256"]),
        ("same_pixels", lambda a, b: a["pixels_sha256"] == b["pixels_sha256"]),
        ("near", near),
    ):
        groups: list[list[int]] = []
        for i in left:
            touching = [group for group in groups if any(same(rows[i], rows[j]) for j in group)]
            groups = [group for group in groups if group not in touching] + [[i, *itertools.chain(*touching)]]
        for group in groups:
            first, *others = sorted(group, key=lambda i: keys[i])
            drops |= {keys[i]: (reason, keys[first]) for i in others}
        left = [i for i in left if keys[i] not in drops]
    for key, (reason, kept) in drops.items():
        while kept in drops:
            kept = drops[kept][1]
        drops[key] = (reason, kept)
    return drops


def drawn(random) -> list[tuple]:
    """Choices for `rows_of`: few hashes, shades and instructions, so that most records are near to another."""

    def flipped(base: int, most: int) -> int:
        return base ^ sum(1 << bit for bit in random.sample(range(64), random.randint(0, most)))

    def hashes() -> tuple[int, int]:
        far = random.random() < 0.3
        dhash = random.getrandbits(64) if far else flipped(0xF0F0F0F0F0F0F0F0, 3)
        return flipped(random.choice([0x0123456789ABCDEF, 0xFEDCBA9876543210]), 4), dhash

    def shade() -> list[int]:
        return [random.choice([60, 95, 100, 100, 103, 120]) for _ in range(3)]

    return [
        (
            [hashes(), hashes()],
            [shade(), shade()],
            random.choice([0, 0, 5]),
            random.choice([1.5, 2.5, 5.0, 5.0]),
            random.randint(0, 30),
        )
        for _ in range(random.randint(8, 20))
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 32).map(Random),
    st.integers(0, MAX_DISTANCE),
    st.integers(0, MAX_GRADIENT),
    st.sampled_from([2.0, 3.0]),
)
def test_groups_are_those_of_comparing_all_with_all(random, distance, gradient, min_entropy):
    rows = rows_of(drawn(random))
    names = [f"k{i:02d}" for i in range(len(rows))]
    random.shuffle(names)
    thresholds = Thresholds(near_distance=distance, near_gradient=gradient, near_min_entropy=min_entropy)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, [Record(key, b"", (), "s") for key in names], records_per_shard=5)
        start = 0
        for shard in read_manifest(folder):
            some = slice(start, start + shard.records)
            for filter, columns in (
                (DUPLICATES, [{name: row[name] for name in DUPLICATES.columns} for row in rows[some]]),
                (ENTROPY, [dict.fromkeys(ENTROPY.columns, 0.1) | {"bits": row["bits"]} for row in rows[some]]),
            ):
                write_scores(folder, filter, shard, names[some], columns)
            start += shard.records
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proposing, "MAX_LINKS", 20)
            score_pairs(folder, progress=False)
        left = [i for i in range(len(rows)) if random.random() < 0.8]  # others failed an earlier rule
        survivors = [Kept(names[i], i, 1, 1, ()) for i in left]
        bits = np.array([rows[i]["bits"] for i in left])
        drops = _duplicates(folder, survivors, [90.0] * len(left), bits, thresholds)
    expected = all_pairs([names[i] for i in left], [rows[i] for i in left], thresholds)
    assert {key: (drop.reason, drop.duplicate_of) for key, drop in drops.items()} == expected
    event(f"near: {sum(reason == 'near' for reason, _ in expected.values()) > 0}")


@pytest.fixture
def folder(tmp_path, picture, encoded):
    """Nine records in three shards: five images, some of them smaller again, one broken."""
    images = [encoded(picture(seed, (80, 60))) for seed in range(5)]
    images += [encoded(picture(seed, (80, 60)).resize((76, 57))) for seed in (3, 1, 1)] + [b"broken"]
    records = [Record(str(i), image, (Caption("a picture for a test"),), "s") for i, image in enumerate(images)]
    write_shards(tmp_path, records, records_per_shard=3)
    return tmp_path


def table_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "scores/pairs").iterdir()}


def test_pairs_do_not_depend_on_processes_and_partitions(folder, monkeypatch):
    report = score(folder, workers=1, progress=False).pairs
    assert (report.records, report.contents, report.near) == (9, 7, 2)
    before = table_files(folder)
    pairs = read_pairs(folder)
    assert pairs.same[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, -1]
    assert [(int(pair["left"]), int(pair["right"])) for pair in pairs.near] == [(1, 6), (3, 5)]
    (folder / "scores/pairs/done.json").unlink()
    monkeypatch.setattr(pair_search, "ENTRIES_PER_PARTITION", 16)
    monkeypatch.setattr(pair_search, "MAX_FOR_ONE_PROCESS", 0)
    assert score_pairs(folder, workers=2, progress=False) == report
    assert table_files(folder) == before and set(before) == {"same.parquet", "near.parquet", "done.json"}


def test_stale_and_damaged_pairs_are_not_used(folder):
    score(folder, workers=1, progress=False)
    assert score(folder, workers=1, progress=False).pairs is None
    kept = select(folder, Thresholds(min_side=30)).keys
    leftover = folder / "scores/pairs/.work-killed"
    leftover.mkdir()
    (folder / "scores/pairs/done.json").write_text("{")
    with pytest.raises(ValueError, match="duplicates have not been compared"):
        select(folder, Thresholds(min_side=30))
    assert score(folder, workers=1, progress=False).pairs is not None and not leftover.exists()
    assert select(folder, Thresholds(min_side=30)).keys == kept
    same = folder / "scores/pairs/same.parquet"
    data = same.read_bytes()
    same.write_bytes(data.replace(data[40:41], bytes([data[40] ^ 16]), 1))
    with pytest.raises(ValueError, match=r"damaged; delete it.*has changed"):
        select(folder, Thresholds(min_side=30))
    same.write_bytes(data)
    marker = folder / "scores/pairs/done.json"
    content = json.loads(marker.read_text())
    del content["table"]  # as earlier versions wrote it
    marker.write_text(json.dumps(content))
    assert select(folder, Thresholds(min_side=30)).keys == kept
    (folder / "scores/pairs/near.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged; delete it"):
        select(folder, Thresholds(min_side=30))
    exact = Thresholds(min_side=30, drop_exact_duplicates=False, drop_near_duplicates=False)
    assert len(select(folder, exact).keys) == 8


def test_new_shard_makes_pairs_stale(folder):
    score(folder, workers=1, progress=False)
    records = [*(Record(str(i), b"", (), "s") for i in range(3))]
    (folder / "manifest.json").unlink()
    write_shards(folder, records, records_per_shard=3)
    assert score(folder, workers=1, progress=False).pairs.records == 3


def _film(frames: int) -> Contents:
    """Frames of one film: the same image with a few bits of noise in hashes and cells."""
    rng, order = np.random.default_rng(0), np.arange(frames)
    film = np.empty(frames, FINGERPRINT)
    flips = np.uint64(1) << rng.integers(0, 64, (2, frames, 2), np.uint64)
    film["phash"], film["dhash"] = np.uint64(0x0123456789ABCDEF) ^ np.bitwise_xor.reduce(flips, axis=2)
    film["pixels"] = order
    film["thumbnail"] = rng.integers(90, 94, film["thumbnail"].shape, np.uint8)
    windows = np.tile(film["phash"][:, None] ^ np.uint64(0xFFFF0000FFFF0000), len(WINDOWS))
    ones, kinds = np.ones(frames, np.int64), np.zeros(frames, np.uint64)
    return Contents(order, order, ones, kinds, film["phash"], film["dhash"], windows, film)


def test_a_crowd_costs_linear_pairs_and_becomes_one_group(tmp_path):
    """Four times the frames propose about four times the pairs, not sixteen times, and no frame is lost."""
    pairs = {}
    for frames in (300, 1200):
        near = pair_search.search(_film(frames), tmp_path)
        group = group_near(np.arange(frames), np.ones(frames, bool), near["left"], near["right"])
        assert len(set(group)) == 1
        pairs[frames] = len(near)
    assert pairs[1200] < 6 * pairs[300] < 1200 * 1199 / 2 / 4


def test_fingerprints_of_an_earlier_version_are_computed_anew(folder):
    score(folder, workers=1, progress=False)
    marker = next((folder / "scores/duplicates").glob("*.done.json"))
    marker.write_text(marker.read_text().replace(f'"version": {DUPLICATES.version}', '"version": 4'))
    (folder / "scores/pairs/done.json").write_text("{}")
    with pytest.raises(ValueError, match="duplicates have not been compared"):
        select(folder, Thresholds(min_side=30))
    report = score(folder, workers=1, progress=False)
    assert report.scored["duplicates"] == 3 and report.scored["entropy"] == 0 and report.pairs is not None
