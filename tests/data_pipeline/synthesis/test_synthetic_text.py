"""Synthetic text: captions quote exactly what is drawn, bytes do not depend on the workers, drops are counted."""

import json
import re

import numpy as np
import pytest

from data_pipeline.buckets import Buckets
from data_pipeline.decoding.images import decode_image
from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder, read_manifest, write_shards
from data_pipeline.synthesis.lettering.fonts import FOLDERS, FontLibrary
from data_pipeline.synthesis.lettering.scripts import SCRIPTS
from data_pipeline.synthesis.lettering.typesetting import Unsuitable, draw_block
from data_pipeline.synthesis.text import job, layout, pure, slides, tables
from data_pipeline.synthesis.text.corpus import BuiltinCorpus
from data_pipeline.synthesis.text.glyphs import SIDE
from data_pipeline.synthesis.text.job import MAX_CAPTION_TOKENS, Job, count_tokens
from data_pipeline.synthesis.text.scenes import Scenes
from data_pipeline.synthesis.text.synthesis import STRATEGIES, Recipe, synthesize_text
from qi2_jax.cli import main
from tests import debian

SEVERAL = ("Latn", "Jpan", "Arab", "Deva", "Thai", "Hant")


@pytest.fixture(scope="module", autouse=True)
def fonts():
    debian.require_debian("fonts-noto-core", FOLDERS[0])
    debian.require_debian("fonts-noto-cjk", FOLDERS[1])


@pytest.fixture(scope="module")
def make(fonts):
    """make(draw, script, seed): one sample, retried with other random numbers until a text suits."""
    library, corpus, scenes = FontLibrary(tuple(SCRIPTS.values())), BuiltinCorpus(), Scenes()
    sizes = Buckets.for_area(512).sizes

    def make(draw, script: str, seed: int):
        for attempt in range(20):
            rng = np.random.default_rng([seed, attempt])
            languages = corpus.languages(script)
            language = languages[rng.integers(len(languages))]
            try:
                return draw(Job(rng, SCRIPTS[script], language, corpus, library, sizes, scenes))
            except Unsuitable:
                continue
        raise AssertionError(f"no sample of {script}")

    return make


DRAWN = [*STRATEGIES.values(), *layout.LAYOUTS]


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("script", SEVERAL)
def test_captions_quote_what_is_drawn_in_reading_order(make, draw, script):
    sample = make(draw, script, 7)
    assert re.findall("“(.*?)”", sample.caption) == list(sample.texts)
    assert count_tokens(sample.caption) <= MAX_CAPTION_TOKENS
    pixels = np.asarray(sample.image)
    assert sample.image.mode == "RGB" and pixels.std() > 1
    assert SCRIPTS[script].name in sample.caption


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_drawn(make, script):
    for seed, draw in enumerate(DRAWN):
        assert make(draw, script, seed).texts


def test_colours_have_the_right_article(make, monkeypatch):
    for module in (pure, slides, tables):
        monkeypatch.setattr(module, "readable_on", lambda *_, **__: "orange")
    monkeypatch.setattr(pure, "choose", lambda *_: "ivory")
    monkeypatch.setattr(slides, "choose", lambda *_: "ivory")
    draws = (STRATEGIES["pure"], *layout.LAYOUTS)
    captions = [make(draw, "Latn", seed).caption for draw in draws for seed in range(4)]
    words = [re.sub("“.*?”", "", caption) for caption in captions]
    assert not [text for text in words if re.search(r"\ba [aeiou]|\ban [^aeiou]", text)]
    for said in ("n orange bar", "an orange line", "an orange circle", "poster on an ivory ground", "plain ivory"):
        assert any(said in text for text in words), said


def test_small_glyphs_are_small(make):
    sizes = set()
    for seed in range(6):
        sample = make(STRATEGIES["glyphs"], "Latn", seed)
        assert sample.image.size == (SIDE, SIDE) and sample.tags == ("synthetic/glyphs",)
        sizes |= {int(size) for size in re.findall(r"(\d+) pixels", sample.caption)}
    assert min(sizes) >= 5 and max(sizes) <= 20 and len(sizes) > 8


@pytest.mark.parametrize("script", ["Latn", "Arab", "Jpan"])
def test_records_know_the_place_of_every_line(make, script, monkeypatch):
    """The image differs from that without text in every box, and nowhere else."""
    for name in ("photo", "glyphs", "layout"):
        blank = {}

        def remember(image, block, *rest, blank=blank):
            blank.setdefault(id(image), (image, image.copy()))
            return draw_block(image, block, *rest)

        if name != "layout":  # whose canvas changes between the texts
            monkeypatch.setattr(job, "draw_block", remember)
        sample = make(STRATEGIES[name], script, 3)
        assert sample.lines and all(any(line.text in text for text in sample.texts) for line in sample.lines)
        if name == "layout":
            continue
        before = next(copy for image, copy in blank.values() if image is sample.image)
        changed = (np.asarray(before) != np.asarray(sample.image)).any(-1)
        assert all(changed[top:bottom, left:right].any() for left, top, right, bottom in (x.box for x in sample.lines))
        for line in sample.lines:
            left, top, right, bottom = line.box
            changed[top:bottom, left:right] = False
        assert not changed.any()


def test_small_text_over_photographs_has_many_sizes_and_shapes(make):
    samples = [make(STRATEGIES["photo"], "Latn", seed) for seed in range(6)]
    sizes = {int(size) for sample in samples for size in re.findall(r"(\d+) pixels", sample.caption)}
    assert min(sizes) >= 5 and max(sizes) <= 20 and len(sizes) > 8
    assert len({sample.image.size for sample in samples}) > 2
    assert all(max(sample.image.size) <= 3 * min(sample.image.size) for sample in samples)
    assert all(sample.licence and sample.tags == ("synthetic/glyphs", "synthetic/photo") for sample in samples)


def test_lines_of_a_sheet_in_perspective_lie_within_it(make):
    sample = make(STRATEGIES["scene"], "Latn", 5)
    (text,) = sample.texts
    assert [line.text for line in sample.lines] and all(line.text in text for line in sample.lines)
    tops = [line.box[1] for line in sample.lines]
    assert tops == sorted(tops)
    for line in sample.lines:
        left, top, right, bottom = line.box
        grey = np.asarray(sample.image.convert("L"), float)[top:bottom, left:right]
        assert right <= sample.image.width and bottom <= sample.image.height and grey.std() > 5


def test_vertical_pages_are_made_and_said_to_be(make):
    samples = [make(STRATEGIES["pure"], "Jpan", seed) for seed in range(12)]
    vertical = [sample for sample in samples if "vertical" in sample.tags]
    assert 0 < len(vertical) < len(samples)
    assert all("vertical columns that run from right to left" in sample.caption for sample in vertical)


def test_the_bytes_do_not_depend_on_the_workers(tmp_path):
    options = {"count": 10, "seed": 3, "scripts": SEVERAL, "side": 320, "records_per_shard": 4, "progress": False}
    one = synthesize_text(tmp_path / "one", workers=1, **options)
    two = synthesize_text(tmp_path / "two", workers=2, **options)
    assert read_manifest(tmp_path / "one") == read_manifest(tmp_path / "two")
    assert (one.made, one.dropped) == (two.made, two.dropped) and one.records == 10
    other = synthesize_text(tmp_path / "other", workers=1, **(options | {"seed": 4}))
    assert other.records == 10 and read_manifest(tmp_path / "other") != read_manifest(tmp_path / "one")

    records = list(RecordFolder(tmp_path / "one"))
    assert [record.key for record in records[:4]] == [
        "pure/00000000.png", "scene/00000001.jpg", "layout/00000002.png", "glyphs/00000003.png"
    ]  # fmt: skip
    for record in records:
        decoded = decode_image(record.image)
        assert decoded.format == ("JPEG" if record.key.endswith("jpg") else "PNG")
        assert max(decoded.image.size) <= 3 * min(decoded.image.size)
        (caption,) = record.captions
        assert (caption.kind, caption.language) == ("text", "en") and "OFL" in record.licence
        assert any(tag.startswith("script/") for tag in record.tags)
        assert record.tags[0] in ("synthetic/text", "synthetic/glyphs") and record.lines


def test_paragraphs_with_a_missing_glyph_are_dropped_and_counted(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A good sentence that can be drawn.\nA bad one with 🜚 in it.\n", encoding="utf-8")
    options = {"count": 12, "strategies": ("pure",), "corpus": corpus, "side": 256, "workers": 1, "progress": False}
    report = synthesize_text(tmp_path / "out", **options)
    assert report.records == 12 and report.dropped["pure"].counts["missing_glyph"] > 0
    assert "U+1F71A" in report.dropped["pure"].examples["missing_glyph"][0]
    records = list(RecordFolder(tmp_path / "out"))
    assert not any("🜚" in record.captions[0].text for record in records)
    assert {record.licence for record in records} == {None}  # the user did not say whose texts these are

    corpus.write_text("Only 🜚 here.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of 2 samples.*missing_glyph"):
        synthesize_text(tmp_path / "none", **(options | {"count": 2}))
    assert not (tmp_path / "none").exists()


def test_long_paragraphs_end_with_a_sentence_before_the_caption_is_full(tmp_path):
    sentence = "The quick brown fox jumps over the lazy dog near the river bank today. "
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"en\t{sentence * 200}\n", encoding="utf-8")
    options = {"strategies": ("pure", "glyphs"), "scripts": ("Latn",), "corpus": corpus, "workers": 1}
    report = synthesize_text(tmp_path / "out", count=8, progress=False, licence="CC0", **options)
    assert report.records == 8
    lengths = []
    for record in RecordFolder(tmp_path / "out"):
        caption = record.captions[0].text
        lengths.append(count_tokens(caption))
        for quoted in re.findall("“(.*?)”", caption):
            assert quoted.endswith("today.") or len(quoted) < len(sentence)
    assert 400 < max(lengths) <= MAX_CAPTION_TOKENS


def test_scenes_come_from_records_and_broken_ones_are_counted(encoded, picture, tmp_path):
    good, broken = encoded(picture(1)), encoded(picture(2))[:200]
    records = [
        Record(f"{number}", image, (), "test", "CC0 1.0")
        for number, image in enumerate((good, broken, encoded(picture(3, (300, 90)))))
    ]
    write_shards(tmp_path / "scenes", records, records_per_shard=2)
    options = {"strategies": ("scene",), "scripts": ("Latn",), "scenes": tmp_path / "scenes", "workers": 1}
    report = synthesize_text(tmp_path / "out", count=5, progress=False, **options)
    assert report.records == 5
    assert set(report.dropped["scene"].examples["broken_scene"]) == {"1", "2"}
    assert all(record.licence.endswith("picture: CC0 1.0") for record in RecordFolder(tmp_path / "out"))


def test_only_the_surroundings_of_the_text_change_in_a_scene(make, monkeypatch):
    seen = []
    draw = Scenes.draw
    monkeypatch.setattr(Scenes, "draw", lambda self, rng: seen.append(draw(self, rng)) or seen[-1])
    sample = make(STRATEGIES["scene"], "Latn", 5)
    before = np.asarray(seen[-1].image.resize(sample.image.size), dtype=np.int16)
    changed = (np.abs(np.asarray(sample.image, dtype=np.int16) - before).max(-1) > 40).mean()
    assert 0.002 < changed < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"side": 100}, "side is 100"),
        ({"strategies": ("pure", "opera")}, "'opera'.*choose from pure"),
        ({"scripts": ("Latin",)}, "'Latin'.*choose from Latn"),
        ({"fonts": ()}, "apt-get install fonts-noto-core"),
    ],
)
def test_arguments_that_cannot_work_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        synthesize_text(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_script_without_texts_is_given_up_and_not_replaced():
    scripts = (SCRIPTS["Latn"],)

    class Empty(BuiltinCorpus):
        def languages(self, script):
            return ()

    recipe = Recipe(0, ("pure",), scripts, FontLibrary(scripts), Empty(), None, 256, "test")
    assert recipe.make(0)[2:] == (None, [("empty_corpus", "Latn")])


def test_the_command_prints_its_tables_and_writes_its_figures(tmp_path, capsys):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    asked = ["--count", "4", "--strategy", "pure", "layout", "--scripts", "Grek", "Kore", "--workers", "1"]
    main.main(["data", "synth", "text", "--out", str(out), "--json", str(figures), "--side", "320", *asked])
    printed = capsys.readouterr()
    assert "4 of 4 records of synthetic text" in printed.out and "Greek (Grek)" in printed.out
    assert "img/s" in printed.err
    content = json.loads(figures.read_text())
    assert content["made"] == {"pure": {"Grek": 1, "Kore": 1}, "layout": {"Grek": 1, "Kore": 1}}
    with pytest.raises(SystemExit, match="already contains records"):
        main.main(["data", "synth", "text", "--out", str(out), "--count", "1", "--strategy", "pure", "--workers", "1"])
