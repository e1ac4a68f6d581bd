"""Texts from a corpus file, hostile lines included, and the built-in sentences."""

import json
import unicodedata

import numpy as np
import pytest

from data_pipeline.funnel import Tally
from data_pipeline.synthesis.lettering.scripts import SCRIPTS, script_of_language, script_of_text
from data_pipeline.synthesis.text.corpus import MAX_LINE_BYTES, REASONS, BuiltinCorpus, Refused, parse_line, read_corpus
from data_pipeline.synthesis.text.phrases import PATTERNS

GOOD = [
    "Plain text without a language.",
    "fr\tUn texte français.",
    json.dumps({"text": "これは日本語です。", "language": "ja"}),
    json.dumps({"text": "Текст без языка."}),
    "zh-TW\t這是一句話。",
]
BAD = {
    "blank": b"   \t ",
    "too_long": b"word " * 300_000,
    "not_utf8": b"caf\xe9",
    "bad_json": b'{"text": 3}',
    "bad_language": json.dumps({"text": "x", "language": "not a tag"}).encode(),
    "control_characters": b"a bell \x07 rings",
    "bidi_controls": "user\u202egnp.exe".encode(),
    "control_tokens": b"see <|image_pad|> here",
    "other_script": "მხოლოდ ქართული".encode(),
}
WANTED = ("Latn", "Cyrl", "Hant", "Jpan")


def write(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_hostile_lines_are_counted_with_their_reason_and_the_others_used(tmp_path):
    assert set(BAD) == set(REASONS)
    lines = [line for pair in zip(GOOD, BAD.values(), strict=False) for line in pair] + list(BAD.values())[len(GOOD) :]
    refused = Tally()
    corpus = read_corpus(write(tmp_path / "corpus.txt", lines), WANTED, None, refused)
    assert refused.counts == dict.fromkeys(BAD, 1)
    assert corpus.lines == len(GOOD)
    found = {(s, language) for s in WANTED for language in corpus.languages(s)}
    assert found == {("Latn", "und"), ("Latn", "fr"), ("Jpan", "ja"), ("Cyrl", "und"), ("Hant", "zh-TW")}
    rng = np.random.default_rng(0)
    assert corpus.paragraph(rng, "Latn", "fr") == "Un texte français."
    assert corpus.paragraph(rng, "Hant", "zh-TW") == "這是一句話。"
    assert "Текст без языка.".startswith(corpus.phrase(rng, "Cyrl", "und"))


def test_a_line_of_exactly_the_limit_is_used_and_what_follows_a_longer_one_too(tmp_path):
    most = ("a" * 63 + " ") * (MAX_LINE_BYTES // 64)
    refused = Tally()
    path = write(tmp_path / "corpus.txt", [most[:-1], most + "b", "c" * (3 * MAX_LINE_BYTES + 7), "last"])
    corpus = read_corpus(path, ("Latn",), None, refused)
    assert (corpus.lines, refused.counts) == (2, {"too_long": 2})
    seen = {corpus.paragraph(np.random.default_rng(seed), "Latn", "und") for seed in range(20)}
    assert seen == {most[:-1], "last"}


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"has no usable paragraph.*blank"):
        read_corpus(write(tmp_path / "corpus.txt", ["  "]), WANTED, None, Tally())
    with pytest.raises(ValueError, match="not a file"):
        read_corpus(tmp_path, WANTED, None, Tally())


def test_text_is_composed_and_its_spaces_made_equal():
    assert parse_line("cafe\u0301  \u2003 au\u202f: lait\r\n".encode())[0] == "café au\u00a0: lait"
    assert parse_line("fa\tمی\u200cشود\u200b".encode())[0] == "می\u200cشود"
    for line, reason in (("\u200fعربي", "bidi_controls"), ("fa\t\u200c", "blank"), ("x\u206a", "control_characters")):
        with pytest.raises(Refused, match=reason):
            parse_line(line.encode())


@pytest.mark.parametrize(
    ("language", "script"),
    [("en", "Latn"), ("zh", "Hans"), ("zh-TW", "Hant"), ("zh-Hant", "Hant"), ("sr-Latn", "Latn"), ("sr", "Cyrl"),
     ("ja", "Jpan"), ("ko", "Kore"), ("ur", "Arab"), ("sw", "Latn"), ("ne", "Deva"), ("xx", None)],
)  # fmt: skip
def test_script_of_a_language(language, script):
    assert script_of_language(language) == script


@pytest.mark.parametrize(
    ("text", "script"),
    [("abc где abc", "Latn"), ("漢字", "Hans"), ("漢字かな", "Jpan"), ("漢字 한글", "Kore"), ("12 + 3", None)],
)
def test_script_of_a_text(text, script):
    assert script_of_text(text) == script


@pytest.mark.parametrize("language", PATTERNS)
def test_builtin_sentences_are_filled_and_in_their_script(language):
    corpus, rng, script = BuiltinCorpus(), np.random.default_rng(1), script_of_language(language)
    assert language in corpus.languages(script)
    for _ in range(12):
        for text in (corpus.paragraph(rng, script, language), corpus.phrase(rng, script, language)):
            assert text == unicodedata.normalize("NFC", text) and not {"{", "}"} & set(text)
            assert script_of_text(text) in (script, "Hans" if SCRIPTS[script].vertical else script)
