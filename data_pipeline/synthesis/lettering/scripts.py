"""Writing systems: their directions, names and fonts.

Scripts have ISO 15924 codes. CLDR's likely subtags give the script of a language, so all languages in one of SCRIPTS
can be used, not only those with built-in phrases.
"""

import functools
from dataclasses import dataclass

from babel import Locale
from babel.core import UnknownLocaleError, get_global
from fontTools import unicodedata

CORE, CJK = "fonts-noto-core", "fonts-noto-cjk"  # Debian packages
_SANS, _SERIF = "sans-serif", "serif"
DISPLAY = " display"  # suffix of styles with thin strokes, for large sizes


@dataclass(frozen=True)
class Script:
    """One writing system.

    Attributes:
      code: ISO 15924 code.
      name: English name, for captions.
      typefaces: pairs of a style and the name of the Noto font without weight and suffix.
      unicode: Unicode script properties of its characters; other characters may come from Noto Sans.
      face: end of the face's name in a font collection, such as `JP`; None if the file has one font.
      rtl: whether it runs from right to left.
      vertical: whether it may also be set in columns from top to bottom, right to left.
    """

    code: str
    name: str
    typefaces: tuple[tuple[str, str], ...]
    unicode: tuple[str, ...]
    face: str | None = None
    rtl: bool = False
    vertical: bool = False

    @property
    def legible(self) -> int:
        """The least font size of a page, in pixels per em.

        10 and 16 are the glyph sizes of English and Chinese in OmniDoc-TokenBench; 13 is our choice in between.
        """
        return 16 if self.face else 10 if self.code in ("Latn", "Cyrl", "Grek") else 13

    @property
    def package(self) -> str:
        """The Debian package with the fonts."""
        return CJK if self.face else CORE


def _noto(code: str, name: str, *fonts: str, rtl: bool = False) -> Script:
    styles = tuple(
        ((_SERIF if font.startswith("Serif") else _SANS) + (DISPLAY if "Display" in font else ""), f"Noto{font}")
        for font in fonts
    )
    return Script(code, name, styles, (code,), rtl=rtl)


def _cjk(code: str, name: str, face: str, *unicode: str) -> Script:
    return Script(
        code, name, ((_SANS, "NotoSansCJK"), (_SERIF, "NotoSerifCJK")), ("Hani", *unicode), face, vertical=True
    )


SCRIPTS = {
    script.code: script
    for script in (
        _noto("Latn", "Latin", "Sans", "Serif", "SansDisplay", "SerifDisplay"),
        _noto("Cyrl", "Cyrillic", "Sans", "Serif", "SansDisplay", "SerifDisplay"),
        _noto("Grek", "Greek", "Sans", "Serif", "SansDisplay", "SerifDisplay"),
        _cjk("Hans", "simplified Chinese", "SC"),
        _cjk("Hant", "traditional Chinese", "TC", "Bopo"),
        _cjk("Jpan", "Japanese", "JP", "Hira", "Kana"),
        _cjk("Kore", "Korean", "KR", "Hang"),
        Script(
            "Arab",
            "Arabic",
            ((_SANS, "NotoSansArabic"), ("Naskh", "NotoNaskhArabic"), ("Kufi", "NotoKufiArabic")),
            ("Arab",),
            rtl=True,
        ),
        _noto("Hebr", "Hebrew", "SansHebrew", "SerifHebrew", rtl=True),
        _noto("Deva", "Devanagari", "SansDevanagari", "SerifDevanagari"),
        _noto("Beng", "Bengali", "SansBengali", "SerifBengali"),
        _noto("Guru", "Gurmukhi", "SansGurmukhi", "SerifGurmukhi"),
        _noto("Gujr", "Gujarati", "SansGujarati", "SerifGujarati"),
        _noto("Taml", "Tamil", "SansTamil", "SerifTamil"),
        _noto("Telu", "Telugu", "SansTelugu", "SerifTelugu"),
        _noto("Thai", "Thai", "SansThai", "SerifThai", "LoopedThai"),
        _noto("Geor", "Georgian", "SansGeorgian", "SerifGeorgian"),
        _noto("Armn", "Armenian", "SansArmenian", "SerifArmenian"),
        _noto("Ethi", "Ethiopic", "SansEthiopic", "SerifEthiopic"),
    )
}
_SCRIPT_OF_PART = {"Hani": "Hans", "Bopo": "Hant", "Hira": "Jpan", "Kana": "Jpan", "Hang": "Kore"}


def find_scripts(codes: tuple[str, ...]) -> tuple[Script, ...]:
    """Looks up scripts by their codes.

    Raises:
      ValueError: for an unknown code, or if there are no codes.
    """
    unknown = [code for code in codes if code not in SCRIPTS]
    if unknown or not codes:
        raise ValueError(f"scripts {unknown or codes} are unknown; choose from {', '.join(SCRIPTS)}")
    return tuple(SCRIPTS[code] for code in dict.fromkeys(codes))


@functools.cache
def script_of_language(language: str) -> str | None:
    """The ISO 15924 code of a language's usual script; None if CLDR does not have the language (BCP 47)."""
    tag = language.replace("-", "_")
    parts = tag.split("_")
    code = next((part.title() for part in parts[1:] if len(part) == 4 and part.isalpha()), None)
    if code is None:
        likely = get_global("likely_subtags")
        region = next((part.upper() for part in parts[1:] if len(part) == 2), None)
        subtags = likely.get(f"{parts[0].lower()}_{region}") or likely.get(parts[0].lower())
        code = subtags.split("_")[1] if subtags else None
    return code


def script_of_text(text: str) -> str | None:
    """The script of most characters of a text, for texts without a language; None if no character has a script.

    Han characters count as simplified Chinese when alone, as Japanese with kana, and as Korean with hangul.
    """
    counts: dict[str, int] = {}
    for character in text:
        code = unicodedata.script(character)
        if code not in ("Zyyy", "Zinh", "Zzzz"):
            counts[code] = counts.get(code, 0) + 1
    if counts.keys() & {"Hani", "Hira", "Kana", "Hang"}:
        for code in ("Hira", "Kana", "Hang", "Bopo"):
            if code in counts:
                return _SCRIPT_OF_PART[code]
    most = max(counts, key=lambda code: (counts[code], code), default=None)
    return _SCRIPT_OF_PART.get(most, most) if most else None


@functools.cache
def language_name(language: str) -> str | None:
    """The English name of a language; None if CLDR has none."""
    try:
        return Locale.parse(language, sep="-").get_language_name("en")
    except (UnknownLocaleError, ValueError):
        return None
