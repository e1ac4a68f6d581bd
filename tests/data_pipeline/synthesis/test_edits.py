"""Generated edit pairs are exact, have matching instructions, and depend on the seed alone."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters.edit_pair import EDIT_PAIR
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.synthesis import rounds
from data_pipeline.synthesis.edits import objects, restoration, synthesis, tone
from data_pipeline.synthesis.edits.compositing import resize_rgba
from data_pipeline.synthesis.edits.cutouts import Unsuitable, find_cutouts, make_cutout
from data_pipeline.synthesis.edits.edit import Ingredients
from data_pipeline.synthesis.edits.synthesis import KINDS, synthesize_edits
from data_pipeline.synthesis.edits.wordings import WORDINGS
from qi2_jax.cli import main
from qi2_jax.pixels import over_white
from tests.debian import require_debian

STAMPS = Path("/usr/share/tuxpaint/stamps")
WITHOUT_TEXT = tuple(kind for kind in KINDS if kind != "text")  # text needs fonts
SIDE = 320


@pytest.fixture(scope="session")
def cutouts(tmp_path_factory):
    """A folder of three objects."""
    folder = tmp_path_factory.mktemp("cutouts")
    for name, colour, chinese in (
        ("A red ball", (220, 30, 30), "一只红球"),
        ("A blue box", (40, 60, 220), "一个蓝盒子"),
        ("A green kite", (30, 200, 60), None),
    ):
        image = Image.new("RGBA", (150, 140))
        draw = ImageDraw.Draw(image)
        shape = {"ball": draw.ellipse, "box": draw.rectangle, "kite": draw.polygon}[name.split()[-1]]
        shape((20, 10, 130, 120) if "kite" not in name else (75, 5, 140, 70, 75, 135, 10, 70), fill=(*colour, 255))
        draw.line((40, 60, 110, 80), fill=(255, 255, 255, 255), width=6)
        image.save(folder / f"{name.split()[-1]}.png")
        lines = [f"{name}.", *([f"zh_CN.utf8={chinese}。"] if chinese else [])]
        (folder / f"{name.split()[-1]}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def edits(demo, cutouts, tmp_path_factory):
    """(records folder of edits of all kinds but text, report)."""
    out = tmp_path_factory.mktemp("edits") / "records"
    options = {"kinds": WITHOUT_TEXT, "cutouts": cutouts, "cutouts_licence": "CC0", "max_side": SIDE}
    return out, synthesize_edits(demo[2], out, count=40, workers=1, progress=False, **options)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(over_white(decode_image(data).image))


def test_every_kind_is_made_with_instructions_tags_and_licence(edits):
    out, report = edits
    records = list(RecordFolder(out))
    assert report.made == dict.fromkeys(WITHOUT_TEXT, 5) and len(records) == 40
    assert {"picture_flat", "picture_undecodable"} & {r for t in report.drawn_again.values() for r in t.counts}
    for number, record in enumerate(records):
        kind = WITHOUT_TEXT[number % len(WITHOUT_TEXT)]
        assert record.key.startswith(f"{kind}/{number:08d}: ") and any(kind[:7] in tag for tag in record.tags)
        assert {caption.kind for caption in record.captions} == {"instruction"}
        assert Counter(caption.language for caption in record.captions)["en"] == 2
        assert len({caption.text for caption in record.captions}) == len(record.captions)
        assert not any(set("{}") & set(caption.text) for caption in record.captions)
        if kind in ("insertion", "removal", "hue"):
            assert record.licence.endswith("; CC0") and record.key.endswith(".png")
        assert len(record.conditions) == {"compose2": 2, "compose3": 3}.get(kind, len(record.conditions))
    languages = {caption.language for record in records for caption in record.captions}
    assert languages == {"en", "zh-Hans"}


def test_workers_do_not_change_a_byte_and_a_longer_run_begins_with_a_shorter_one(demo, cutouts, edits, tmp_path):
    options = {"kinds": WITHOUT_TEXT, "cutouts": cutouts, "cutouts_licence": "CC0", "max_side": SIDE}
    synthesize_edits(demo[2], tmp_path / "two", count=16, workers=2, progress=False, **options)
    assert list(RecordFolder(tmp_path / "two")) == list(RecordFolder(edits[0]))[:16]
    synthesize_edits(demo[2], tmp_path / "other", count=8, seed=1, workers=1, progress=False, **options)
    assert [r.key for r in RecordFolder(tmp_path / "other")] != [r.key for r in RecordFolder(edits[0])][:8]


@pytest.fixture
def take(demo, cutouts):
    return Ingredients(RecordFolder(demo[2]), find_cutouts(cutouts, None), SIDE, None, lambda reason: None)


def succeed(make, take, seed):
    """The first edit that succeeds in a series of draws, and its random numbers."""
    for attempt in range(20):
        try:
            return make(take, np.random.default_rng([seed, attempt])), attempt
        except Unsuitable:
            pass
    raise AssertionError("nothing suits")


def as_pixels(image) -> np.ndarray:
    return pixels(image) if isinstance(image, bytes) else np.asarray(image)


@pytest.mark.parametrize("seed", range(3))
def test_removal_is_the_inverse_of_insertion(take, seed):
    inserted, attempt = succeed(objects.insertion, take, seed)
    removed = objects.removal(take, np.random.default_rng([seed, attempt]))
    assert np.array_equal(as_pixels(inserted.sources[0]), as_pixels(removed.target))
    assert np.array_equal(as_pixels(inserted.target), as_pixels(removed.sources[0]))


def test_edits_of_an_object_touch_nothing_far_from_it(edits):
    found = 0
    for record in RecordFolder(edits[0]):
        if "edit/local" in record.tags:
            changed = np.any(pixels(record.conditions[0]) != pixels(record.image), axis=2)
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            box = np.zeros_like(changed)
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            assert changed.any() and box.mean() < 0.6
            found += 1
    assert found == 15


def test_images_that_stay_keep_their_bytes(demo, cutouts, tmp_path):
    stored = {record.image for record in RecordFolder(demo[2])}
    synthesize_edits(
        demo[2], tmp_path / "out", count=5, kinds=("restoration",), max_side=4096, workers=1, progress=False
    )
    records = list(RecordFolder(tmp_path / "out"))
    assert all(record.image in stored and record.conditions[0] not in stored for record in records)


@pytest.mark.parametrize("form", restoration.FORMS)
def test_every_degradation_is_seen_and_leaves_the_scene(take, form, monkeypatch):
    monkeypatch.setattr(restoration, "FORMS", (form,))
    edit, _ = succeed(restoration.restoration, take, 7)
    assert edit.tags[-1].endswith(form)
    source, target = (as_pixels(image).astype(np.float32) for image in (edit.sources[0], edit.target))
    assert np.abs(source - target).mean() > 2
    assert np.corrcoef(source.ravel(), target.ravel())[0, 1] > 0.6
    if form == "low_light":
        assert source.mean() < 0.7 * target.mean()


def test_tones_do_what_they_say():
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0.2, 0.7, (16, 16, 3)).astype(np.float32)

    def chroma(values):
        return float((values.max(2) - values.min(2)).mean())

    changed = {form: tone.adjust(pixels, form, 1.0) for form in tone.FORMS}
    assert chroma(changed["desaturate"]) < 0.5 * chroma(pixels) < chroma(pixels) < 0.6 * chroma(changed["saturate"])
    assert chroma(changed["black_and_white"]) < 1e-6
    assert changed["darken"].mean() < 0.8 * pixels.mean() < pixels.mean() < 0.8 * changed["brighten"].mean()
    for form, sign in (("warm", 1), ("cool", -1)):
        balance = (changed[form][..., 0] / changed[form][..., 2]) / (pixels[..., 0] / pixels[..., 2])
        assert np.all(sign * np.log(balance) > 0.1)
        luma = np.array(tone.LUMA)
        assert (changed[form] @ luma).mean() == pytest.approx((pixels @ luma).mean(), rel=0.05)


def test_named_sources_are_where_they_are_said_to_be(edits, tmp_path):
    """The target resembles the source whose scene the instructions name."""
    records = [record for record in RecordFolder(edits[0]) if "edit/compose/2" in record.tags]
    write_shards(tmp_path, records, records_per_shard=99)
    score(tmp_path, filters=(EDIT_PAIR,), workers=1, progress=False)
    rows = list(read_scores(tmp_path, (EDIT_PAIR,)))
    scene = re.compile(
        r"(?:scene of|where|left|right|top|bottom|middle) (?:of )?image (\d)|Image (\d) with|[到入]图(\d)"
    )
    for record, row in zip(records, rows, strict=True):
        for caption in record.captions:
            named = scene.search(caption.text)
            assert int(next(filter(None, named.groups()))) == row["edit_pair.base"], caption.text
    assert {row["edit_pair.base"] for row in rows} == {1, 2}


def test_chinese_instructions_have_chinese_punctuation():
    forms = [form for wordings in WORDINGS.values() for form in wordings["zh"]]
    assert not [form for form in forms if re.search(r"[,.:;!?()\"']", re.sub(r"\{\w+\}", "", form))]


def test_scaled_cutouts_have_no_halo():
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))  # white where it is not seen
    image.paste((200, 0, 0, 255), (16, 16, 48, 48))
    small = np.asarray(resize_rgba(image, (23, 23)))
    assert np.all(small[small[..., 3] > 64][:, 1:3] < 8)


@pytest.mark.parametrize(
    ("english", "image", "reason"),
    [
        ("A ball", None, None),
        ("The Sun.", None, "cutout_without_name"),
        ("A ripe, red tomato", None, "cutout_without_name"),
        ("A very long name that no sentence can hold", None, "cutout_without_name"),
        ("A ball", Image.new("RGB", (90, 90), "red"), "cutout_not_transparent"),
        ("A ball", Image.new("RGBA", (90, 90), (255, 0, 0, 120)), "cutout_not_solid"),
        ("A ball", Image.new("RGBA", (20, 20), (255, 0, 0, 254)), "cutout_too_small_or_thin"),
    ],
)
def test_what_is_a_cutout(english, image, reason, cutouts, encoded):
    data = (cutouts / "ball.png").read_bytes() if image is None else encoded(image)
    if reason is None:
        found = make_cutout(data, "ball", english, "一只红球。", None)
        assert (found.english, found.definite, found.bare_chinese) == ("a ball", "the ball", "红球")
        assert found.image.size == (111, 111)
    else:
        with pytest.raises(Unsuitable, match=reason):
            make_cutout(data, "ball", english, None, None)


def test_cutouts_are_found_among_the_records(demo, cutouts, tmp_path):
    records = [record for record in RecordFolder(demo[2]) if record.key.startswith("clean/")]
    ball = Record("ball.png", (cutouts / "ball.png").read_bytes(), (Caption("A ball"),), "s", "CC0")
    write_shards(tmp_path / "in", [*records, ball], records_per_shard=99)
    options = {"kinds": ("insertion",), "max_side": SIDE, "workers": 1, "progress": False}
    synthesize_edits(tmp_path / "in", tmp_path / "out", count=4, **options)
    made = list(RecordFolder(tmp_path / "out"))
    assert made and all(record.key.endswith(" + ball.png") for record in made)


def test_the_requested_number_is_made_from_usable_images(demo, tmp_path, monkeypatch):
    records = [record for record in RecordFolder(demo[2]) if record.key.startswith("clean/")][:4]
    write_shards(tmp_path / "in", records, records_per_shard=99)
    kinds = {kind: make for kind, make in KINDS.items() if kind != "text"}  # text needs fonts
    monkeypatch.setattr(synthesis, "KINDS", kinds)
    options = {"max_side": SIDE, "workers": 1, "progress": False}
    report = synthesize_edits(tmp_path / "in", tmp_path / "out", count=9, **options)
    assert report.records == len(RecordFolder(tmp_path / "out")) == 9 and report.shortfall is None
    assert set(report.made) == {"restoration", "tone"} and report.without_cutouts == synthesis.WITH_CUTOUTS
    with pytest.raises(ValueError, match=r"kinds hue need cut-outs, and no record of .* with --cutouts, or leave"):
        synthesize_edits(tmp_path / "in", tmp_path / "none", kinds=("tone", "hue"), **options)
    command = ["data", "synth", "edits", "--from", str(tmp_path / "in"), "--out", str(tmp_path / "few")]
    monkeypatch.setattr(synthesis, "KINDS", kinds | {"tone": unsuitable})
    monkeypatch.setattr(rounds, "MAX_TRIES_PER_RECORD", 1)
    options = ["--count", "4", "--kinds", "restoration", "tone", "--workers", "1", "--max-side", str(SIDE)]
    with pytest.raises(SystemExit, match="made only 2 of 4 records; most frequent reasons: picture_flat 2"):
        main.main([*command, *options, "--json", str(tmp_path / "few.json")])
    assert json.loads((tmp_path / "few.json").read_text())["records"] == len(RecordFolder(tmp_path / "few")) == 2


def unsuitable(take, rng):
    raise Unsuitable("picture_flat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"max_side": 100}, "max_side is 100; it must be at least 256"),
        ({"kinds": ("texts",)}, r"kinds \['texts'\] are unknown; choose from text, restoration"),
        ({"kinds": ("text",), "fonts": ()}, "apt-get install fonts-noto-core"),
        ({"cutouts": Path(__file__).parent}, "has no PNG or WebP file with a .txt file"),
        ({"kinds": ("removal",)}, "none of 2 edits could be made from .*cutout_"),
    ],
)
def test_what_cannot_be_made_is_named(demo, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        synthesize_edits(demo[2], tmp_path / "out", **({"count": 2, "workers": 1, "progress": False} | options))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_words_change_and_nothing_else(demo, tmp_path):
    require_debian("fonts-noto-core", "/usr/share/fonts/truetype/noto")
    require_debian("fonts-noto-cjk", "/usr/share/fonts/opentype/noto")
    options = {"kinds": ("text",), "max_side": SIDE, "workers": 1, "progress": False}
    synthesize_edits(demo[2], tmp_path, count=12, **options)
    forms = Counter()
    for record in RecordFolder(tmp_path):
        form = record.tags[-1].removeprefix("edit/text/")
        forms[form] += 1
        changed = np.any(pixels(record.conditions[0]) != pixels(record.image), axis=2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert 14 <= rows[-1] - rows[0] < 0.7 * len(changed) and columns[-1] - columns[0] < 0.95 * changed.shape[1]
        assert rows[0] > 0 and rows[-1] < len(changed) - 1 and columns[0] > 0, "clipped"
        assert len(re.findall('["“](.+?)["”]', record.captions[0].text)) == (2 if form == "change" else 1)
    assert set(forms) == {"change", "add", "remove"}


def test_debian_stamps_are_cutouts_with_names():
    require_debian("tuxpaint-stamps-default", STAMPS)
    reasons = Counter()
    for file in find_cutouts(STAMPS, "GPL-2")[::8]:
        try:
            cutout = file.read()
            reasons["usable"] += 1
            reasons["chinese"] += cutout.chinese is not None
            assert re.fullmatch(r"an? .+", cutout.english) and cutout.image.mode == "RGBA"
        except Unsuitable as reason:
            reasons[str(reason)] += 1
    assert reasons["usable"] > 25 and reasons["chinese"] > 15 and reasons["cutout_undecodable"] == 0, reasons


def test_command_makes_a_folder_that_scores_selects_and_reports(demo, cutouts, tmp_path, capsys):
    out, figures = str(tmp_path / "out"), tmp_path / "figures.json"
    command = ["data", "synth", "edits", "--from", str(demo[2]), "--cutouts", str(cutouts), "--out", out]
    kinds = ["restoration", "removal", "background", "compose2"]
    options = ["--count", "8", "--max-side", str(SIDE), "--workers", "1", "--json", str(figures)]
    main.main([*command, *options, "--kinds", *kinds])
    assert json.loads(figures.read_text())["kinds"]["removal"]["made"] == 2
    assert "8 of 8 edits" in capsys.readouterr().out
    main.main(["data", "score", out, "--workers", "1"])
    config = ["--config", "experiments/qwen_image_2/s2_256p_edits.py:tiny"]
    main.main(["data", "select", out, *config, "--json", str(figures)])
    chosen = json.loads(figures.read_text())
    assert chosen["kept"] == 8, chosen["funnel"]
    main.main(["data", "report", out, *config])
    page = (tmp_path / "out/report.html").read_text()
    assert "edit_pair.unchanged_psnr" in page and "edit/restoration" in page
    assert {figure.count("<img") for figure in re.findall("<figure.*?</figure>", page)} == {2, 3}  # sources and target
