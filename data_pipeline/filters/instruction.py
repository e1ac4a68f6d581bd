"""Instructions: which source images a text names, and whether it is written in the script of its language.

Quoted text is ignored: `write "Figure 7"` names no source, and a Chinese instruction may quote English words.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold
from data_pipeline.records.schema import Caption

QUOTED = re.compile(r"\"[^\"]*\"|“[^“”]*”|«[^«»]*»|「[^「」]*」|『[^『』]*』|„[^„“”]*[“”]|(?<!\w)['‘][^'‘’]*['’](?!\w)")

_ENGLISH = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CARDINALS = {word: value for words in (_ENGLISH, "一二三四五六七八九十") for value, word in enumerate(words, start=1)}
_ORDINALS = {
    word: number
    for number, words in enumerate(
        (
            "first erste ersten erstes premier première primera primer prima primo primeira primeiro первое первом 첫",
            "second zweite zweiten zweites deuxième seconde segunda segundo seconda secondo второе втором второй 두",
            "third dritte dritten drittes troisième tercera tercer terza terzo terceira terceiro третье третьем 세",
            "fourth vierte vierten viertes quatrième cuarta quarta quarto четвёртое четвертое четвёртом 네",
            "fifth fünfte fünften cinquième quinta quinto пятое пятом 다섯",
            "sixth sechste sechsten sixième sexta sesta шестое шестом 여섯",
            "seventh siebte siebten septième séptima settima седьмое седьмом 일곱",
            "eighth achte achten huitième octava ottava восьмое восьмом 여덟",
            "ninth neunte neunten neuvième novena nona девятое девятом 아홉",
            "tenth zehnte zehnten dixième décima decima десятое десятом 열",
        ),
        start=1,
    )
    for word in words.split()
}
_VALUES = _CARDINALS | _ORDINALS

_NOUN = (
    r"(?:images?|pictures?|photos?|photographs?|figures?|imagen|imágenes|imagem|immagine|bild(?:es)?|abbildung|foto|"
    r"изображени[еияю]|картинк[аеиуой]+|фото)"
)
_WORD = "|".join(word for word in _ORDINALS if ord(word[0]) < 0x1100)  # Korean ordinals have a separate pattern
_CARDINAL = rf"\d{{1,2}}(?!\d|[.:]\d|,\d{{3}}|%|st\b|nd\b|rd\b|th\b)|{'|'.join(_ENGLISH)}"
_CJK_NUMBER = r"\d{1,2}(?!\d)|[一二三四五六七八九十]"
_ELSEWHERE = r"(?!\s(?:from|on|to)\sthe\s(?:left|right|top|bottom|wall|shelf|screen))"  # an image that a source shows
_AND = r"(?:\s?[,&–-]|,?\s(?:and|und|et|y|e|и|to))\s?"
_COUNTED = "个個只張张幅位名种種条條人"  # counters: the number before one is an amount, not a name

_WORDS = re.compile("|".join((r"\d+", *sorted(_VALUES, key=len, reverse=True))))
_RANGE = re.compile(r"\d\s*[-–]\s*\d|\bto\b")

# Each pattern captures numbers of source images. Numbers above 99 are ignored, since they are usually years.
_NAMED = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b{_NOUN}[\s_-]?(?:no\.?|nr\.?|number|#|№)?\s?((?:{_CARDINAL})(?:{_AND}(?:{_CARDINAL}))*)\b",
        rf"\b(?:({_WORD})|(\d{{1,2}})(?:st|nd|rd|th|\.|º|ª|e|-е|-го|-м))\s{_NOUN}\b{_ELSEWHERE}",
        rf"(?:图片|图像|照片|相片|图|圖片|圖像|圖|画像|写真)\s?({_CJK_NUMBER})(?![{_COUNTED}])",
        rf"第\s?({_CJK_NUMBER})\s?[张張幅个個]\s?(?:图|圖|照|相|画)",
        rf"({_CJK_NUMBER})\s?(?:枚目|番目)の?\s*(?:画像|写真|図)",
        r"(?:이미지|사진|그림)\s?(\d{1,2})(?!\d|개|장|명)",
        r"(?:(첫|두|세|네|다섯|여섯|일곱|여덟|아홉|열)\s?번째|(\d{1,2})번(?:째)?)\s?(?:이미지|사진|그림)",
    )
)

# Main scripts of languages, as the first words of Unicode letter names. Other languages get no score.
_SCRIPTS: dict[tuple[str, ...], str] = {
    ("CJK",): "zh yue wuu",
    ("CJK", "HIRAGANA", "KATAKANA"): "ja",
    ("HANGUL",): "ko",
    ("CYRILLIC",): "ru uk be bg mk kk ky tg mn",
    ("CYRILLIC", "LATIN"): "sr uz bs",
    ("ARABIC",): "ar fa ur ps ckb ug",
    ("HEBREW",): "he yi",
    ("DEVANAGARI",): "hi mr ne sa",
    ("BENGALI",): "bn as",
    ("GURMUKHI", "ARABIC"): "pa",
    ("GUJARATI",): "gu",
    ("TAMIL",): "ta",
    ("TELUGU",): "te",
    ("KANNADA",): "kn",
    ("MALAYALAM",): "ml",
    ("THAI",): "th",
    ("LAO",): "lo",
    ("KHMER",): "km",
    ("MYANMAR",): "my",
    ("TIBETAN",): "bo",
    ("GEORGIAN",): "ka",
    ("ARMENIAN",): "hy",
    ("ETHIOPIC",): "am ti",
    ("GREEK",): "el",
    ("LATIN",): "en fr de es it pt nl sv da nb nn no fi is pl cs sk sl hr hu ro et lv lt sq tr az vi id ms tl sw af ca "
    "gl eu ga cy mt eo la ast oc br lb",
}
_BY_LANGUAGE = {language: scripts for scripts, languages in _SCRIPTS.items() for language in languages.split()}
_BY_SUBTAG: dict[str, tuple[str, ...]] = {
    "latn": ("LATIN",),
    "cyrl": ("CYRILLIC",),
    "arab": ("ARABIC",),
    "deva": ("DEVANAGARI",),
    "hans": ("CJK",),
}
_BY_SUBTAG |= {"hant": ("CJK",), "jpan": ("CJK", "HIRAGANA", "KATAKANA"), "kore": ("HANGUL",), "guru": ("GURMUKHI",)}
# Scripts in which one letter carries as much as three letters of an alphabet.
_DENSE = ("CJK", "HANGUL", "HIRAGANA", "KATAKANA")


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `INSTRUCTION_TEXT` for each candidate."""
    return [_score(candidate.record.captions) for candidate in candidates]


def _score(captions: tuple[Caption, ...]) -> dict:
    named = [named_sources(caption.text) for caption in captions]
    return {
        "last_source": [max(numbers, default=0) for numbers in named],
        "sources": [len(numbers) for numbers in named],
        "script": [script_share(caption.text, caption.language) for caption in captions],
    }


def named_sources(text: str) -> set[int]:
    """Numbers, from 1, of the source images that a text names, as in `image 2`, `the second photo` and `图3`."""
    return set(_numbers(" ".join(QUOTED.sub(" ", text).split())))


def _numbers(text: str) -> Iterator[int]:
    for pattern in _NAMED:
        for match in pattern.finditer(text):
            words = next(group for group in match.groups() if group is not None).lower()
            numbers = [int(word) if word.isdecimal() else _VALUES[word] for word in _WORDS.findall(words)]
            if numbers[0] == 0:
                continue  # a text that counts from zero is ambiguous
            yield from range(numbers[0], numbers[-1] + 1) if _RANGE.search(words) else numbers


def script_share(text: str, language: str | None) -> float | None:
    """Share of a text's letters, 0..1, in the script of its language; None for an unknown language.

    Letters that represent a syllable or a word count as three.
    """
    first, *rest = (language or "").lower().split("-")
    scripts = next((_BY_SUBTAG[part] for part in rest if part in _BY_SUBTAG), _BY_LANGUAGE.get(first))
    if scripts is None:
        return None
    counts: Counter[str] = Counter()
    for letter in filter(str.isalpha, QUOTED.sub(" ", text)):
        script = unicodedata.name(letter, "OTHER").split()[0]
        counts[script] += 3 if script in _DENSE else 1
    total = counts.total()
    return round(sum(counts[script] for script in scripts) / total, 4) if total else None


def _drops_caption(row: Row, number: int, settings: Settings) -> str | None:
    count = row["description.conditions"]
    if not count:
        return None
    if row["instruction.last_source"][number] > count:
        return "names_missing_source"
    composed = count > 1 and "edit/compose" in row["description.tags"]
    if settings.name_sources and composed and row["instruction.sources"][number] < count:
        return "source_not_named"
    script = row["instruction.script"][number]
    return "other_script" if script is not None and script < settings.min_script else None


INSTRUCTION_TEXT = Filter(
    name="instruction",
    version=1,
    columns={
        "last_source": (list[int], "highest source image number that each caption names; 0: none"),
        "sources": (list[int], "number of source images that each caption names"),
        "script": (list[float], "share of each caption's letters in the script of its language"),
    },
    score=score,
    thresholds=(
        Threshold(
            "min_script",
            0.2,
            "share of an instruction's letters in the script of its declared language; names and brands may use other "
            "scripts",
            low=0,
            high=1,
            column="script",
            applies_to="edits",
            reason="other_script",
        ),
        Threshold(
            "name_sources",
            True,
            "whether to drop instructions of edits tagged `edit/compose` that do not name all of several sources",
            reason="source_not_named",
        ),
    ),
    step="captions",
    drops_caption=_drops_caption,
    sees_broken=True,
)
