"""The corpus, the source of words: a file from the user, or built-in phrases with names from CLDR.

A corpus file has one paragraph per line: plain text, `LANGUAGE<tab>TEXT`, or JSON `{"text": .., "language": ..}`. Only
the offsets of its lines are kept in memory. `read_corpus` counts unusable lines by reason.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from babel import Locale
from babel.dates import format_date
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_unit

from data_pipeline.funnel import Tally
from data_pipeline.synthesis.lettering.fonts import JOINERS
from data_pipeline.synthesis.lettering.linebreak import sentences, shorten
from data_pipeline.synthesis.lettering.scripts import SCRIPTS, script_of_language, script_of_text
from data_pipeline.synthesis.text.phrases import PATTERNS
from qi2_jax.runtime.text_files import read_text
from qi2_jax.text.qwen_tokenizer import SPECIAL_TOKENS

MAX_LINE_BYTES = 64 << 10
REASONS = {
    "blank": "a line without letters and digits",
    "too_long": f"a line above {MAX_LINE_BYTES} bytes",
    "not_utf8": "a line that is not UTF-8",
    "bad_json": "a line that begins with a brace and is not a JSON object with a text",
    "bad_language": "a language that is not a BCP 47 tag",
    "control_characters": "control, invisible, private-use and unassigned characters",
    "bidi_controls": "marks and overrides of direction, with which the image would differ from the text",
    "control_tokens": "a control token of the tokenizer, such as <|image_pad|>",
    "other_script": "a script that was not requested",
}
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_PREFIX = re.compile(r"([A-Za-z0-9-]{2,20})\t")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_HINTS = re.compile("[\u00ad\u200b\u2060\ufeff]")  # line break hints, which ICU does not need
_TOKENS = tuple(token for token, _ in SPECIAL_TOKENS)
_NO_PLACES = ("EU", "EZ", "QO", "UN", "XA", "XB", "ZZ")  # regions of CLDR that are not countries
_NO_SPACE = ("Hans", "Hant", "Jpan")  # scripts without spaces between sentences


@runtime_checkable
class Corpus(Protocol):
    """Texts by script and language."""

    licence: str | None

    def languages(self, script: str) -> tuple[str, ...]:
        """Languages (BCP 47; `und` if unknown) of the texts in a script, in a fixed order."""

    def paragraph(self, rng: np.random.Generator, script: str, language: str) -> str:
        """A paragraph of one or more sentences."""

    def phrase(self, rng: np.random.Generator, script: str, language: str) -> str:
        """A few words: a title or a label."""


class Refused(Exception):
    """A line that cannot be used, with one of REASONS as its only argument."""


def clean(text: str) -> str:
    """Normalises a text for drawing and quoting: NFC, with each run of white space as one space or no-break space.

    Raises:
      Refused: for characters that must not be drawn.
    """
    text = unicodedata.normalize("NFC", _HINTS.sub("", text.replace("\u202f", "\u00a0")))
    text = re.sub(r"[^\S\u00a0]+", " ", text).strip()
    if not any(unicodedata.category(character)[0] in "LN" for character in text):
        raise Refused("blank")
    if _BIDI.search(text):
        raise Refused("bidi_controls")
    if any(token in text for token in _TOKENS):
        raise Refused("control_tokens")
    for character in text:
        if unicodedata.category(character)[0] == "C" and character not in JOINERS:
            raise Refused("control_characters")
    return text


def parse_line(line: bytes) -> tuple[str, str, str | None]:
    """Returns the text, language, and script code (or None) of a line of a corpus.

    Raises:
      Refused: if the line cannot be used.
    """
    if len(line) > MAX_LINE_BYTES:
        raise Refused("too_long")
    try:
        content = read_text(line).strip("\n")
    except ValueError:
        raise Refused("not_utf8") from None
    language: object = None
    if content.lstrip().startswith("{"):
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused("bad_json") from None
        if not isinstance(fields.get("text"), str):
            raise Refused("bad_json")
        content, language = fields["text"], fields.get("language")
    elif prefix := _PREFIX.match(content):
        language, content = prefix[1], content[prefix.end() :]
    if language is not None and not (isinstance(language, str) and _LANGUAGE.fullmatch(language)):
        raise Refused("bad_language")
    text = clean(content)
    return text, language or "und", script_of_language(language) if language else script_of_text(text)


class CorpusFile:
    """The usable lines of a file, by script and language; see `read_corpus`. It can be pickled for worker processes."""

    def __init__(self, path: Path, offsets: dict[str, dict[str, np.ndarray]], licence: str | None):
        self.path, self.offsets, self.licence = path, offsets, licence

    @property
    def lines(self) -> int:
        """Number of usable lines."""
        return sum(len(offsets) for by_language in self.offsets.values() for offsets in by_language.values())

    def languages(self, script: str) -> tuple[str, ...]:
        return tuple(sorted(self.offsets.get(script, {})))

    def paragraph(self, rng: np.random.Generator, script: str, language: str) -> str:
        offsets = self.offsets[script][language]
        with open(self.path, "rb") as file:
            file.seek(int(offsets[rng.integers(len(offsets))]))
            try:
                return parse_line(file.readline(MAX_LINE_BYTES + 1))[0]
            except Refused as refused:
                raise ValueError(f"{self.path} changed while it was in use ({refused})") from None

    def phrase(self, rng: np.random.Generator, script: str, language: str) -> str:
        choices = sentences(self.paragraph(rng, script, language), language)
        sentence, most = choices[rng.integers(len(choices))].strip(), int(rng.integers(8, 28))
        return shorten(sentence, language, lambda beginning: len(beginning) <= most) or sentence


def read_corpus(path: Path | str, scripts: tuple[str, ...], licence: str | None, refused: Tally) -> CorpusFile:
    """Scans a corpus file line by line, in bounded memory, and counts unusable lines in `refused`.

    Raises:
      ValueError: if the file does not exist, or it has no usable line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the corpus {path} is not a file")
    offsets: dict[str, dict[str, list[int]]] = {}
    place, number = 0, 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                _, language, script = parse_line(line)
                if script not in scripts:
                    raise Refused("other_script")
                offsets.setdefault(script, {}).setdefault(language, []).append(place)
            except Refused as reason:
                refused.add(str(reason), f"line {number}")
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)  # the rest of a line that is too long
            place = file.tell()
    if not offsets:
        raise ValueError(
            f"{path} has no usable paragraph in the scripts {', '.join(scripts)}; refused: {refused.counts}"
        )
    arrays = {
        script: {language: np.asarray(places, dtype=np.int64) for language, places in by_language.items()}
        for script, by_language in offsets.items()
    }
    return CorpusFile(path, arrays, licence)


class BuiltinCorpus:
    """Sentences from `phrases.PATTERNS`, filled with dates, lists and measures in the CLDR format of each language."""

    licence: str | None = "texts: Apache-2.0, with names from Unicode CLDR (Unicode-3.0)"

    def languages(self, script: str) -> tuple[str, ...]:
        return _languages().get(script, ())

    def paragraph(self, rng: np.random.Generator, script: str, language: str) -> str:
        patterns = PATTERNS[language]
        count = int(rng.integers(1, 8))
        chosen = [patterns[index] for index in rng.permutation(len(patterns))[:count]]
        separator = "" if script in _NO_SPACE else " "
        return _clean(separator.join(_fill(rng, language, pattern) for pattern in chosen))

    def phrase(self, rng: np.random.Generator, script: str, language: str) -> str:
        names = _names(language)
        kind = ("places", "tongues", "days", "months")[rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))]
        choices = names[kind]
        if rng.random() < 0.2:
            return _clean(_list(rng, language, choices, 2))
        return _clean(choices[rng.integers(len(choices))])


@functools.cache
def _languages() -> dict[str, tuple[str, ...]]:
    by_script: dict[str, tuple[str, ...]] = {}
    for language in PATTERNS:
        code = script_of_language(language)
        assert code in SCRIPTS
        by_script[code] = (*by_script.get(code, ()), language)
    return by_script


def _clean(text: str) -> str:
    """Removes CLDR's direction marks, and the second full stop after an abbreviation at the end of a sentence."""
    return clean(_BIDI.sub("", text).replace("..", "."))


@functools.cache
def _locale(language: str) -> Locale:
    return Locale.parse(language, sep="-")


@functools.cache
def _names(language: str) -> dict[str, tuple[str, ...]]:
    """Names in a fixed order, except those in another script than that of the language."""
    locale, script = _locale(language), script_of_language(language)
    assert script is not None
    codes = SCRIPTS[script].unicode

    def usable(names: Mapping[Any, str]) -> tuple[str, ...]:
        from fontTools.unicodedata import script as script_of

        ordered = dict(sorted(names.items())).values()
        return tuple(
            name for name in ordered if all(script_of(character) in (*codes, "Zyyy", "Zinh") for character in name)
        )

    return {
        "places": usable(
            {code: name for code, name in locale.territories.items() if len(code) == 2 and code not in _NO_PLACES}
        ),
        "tongues": usable({code: name for code, name in locale.languages.items() if len(code) == 2}),
        "days": usable(locale.days["stand-alone"]["wide"]),
        "months": usable(locale.months["format"]["wide"]),
    }


def _list(rng: np.random.Generator, language: str, names: tuple[str, ...], count: int) -> str:
    chosen = rng.choice(len(names), size=min(count, len(names)), replace=False)
    return format_list([names[index] for index in chosen], locale=_locale(language))


def _fill(rng: np.random.Generator, language: str, pattern: str) -> str:
    locale, names = _locale(language), _names(language)
    if "{date}" in pattern:
        day = date(1990, 1, 1) + timedelta(days=int(rng.integers(15_000)))
        return pattern.format(date=format_date(day, "full", locale=locale))
    if "{price}" in pattern:
        currency = ("EUR", "USD", "JPY", "GBP", "CHF")[rng.integers(5)]
        return pattern.format(
            price=format_currency(int(rng.integers(2, 500)), currency, locale=locale, format_type="name")
        )
    for slot, unit in (("distance", ("length-kilometer", "length-meter")), ("weight", ("mass-kilogram", "mass-gram"))):
        if f"{{{slot}}}" in pattern:
            amount = float(rng.integers(2, 100)) / int(rng.choice([1, 2]))
            return pattern.format(**{slot: _measure(amount, unit[rng.integers(2)], language)})
    for slot in ("places", "tongues", "days"):
        if f"{{{slot}}}" in pattern:
            return pattern.format(**{slot: _list(rng, language, names[slot], int(rng.integers(2, 5)))})
    raise AssertionError(pattern)


def _measure(amount: float, unit: str, language: str) -> str:
    """A measure in CLDR's long form, or in the short form if Babel lacks the long one."""
    for width in ("long", "short"):
        text = format_unit(amount, unit, width, locale=_locale(language), numbering_system="default")
        if unit not in text:
            return text
    raise AssertionError(f"CLDR has no {unit} in {language}")
