"""Fonts: the Noto files of a script, their characters, and the division of a text into runs of one font.

The font of a script often lacks Latin letters, digits or brackets. These come from Noto Sans or Noto Serif, as in any
typesetting program. A character in neither font is a missing glyph, which the fonts' tables show without drawing.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from fontTools import unicodedata
from fontTools.ttLib import TTCollection, TTFont
from PIL import ImageFont, features

from data_pipeline.synthesis.lettering.linebreak import graphemes
from data_pipeline.synthesis.lettering.scripts import Script

FONTS_HINT = ", or name the folder of the Noto fonts with --fonts"
FOLDERS = (Path("/usr/share/fonts/truetype/noto"), Path("/usr/share/fonts/opentype/noto"))
JOINERS = {"\u200c", "\u200d"}  # zero-width (non-)joiners, which control shaping and need no glyph


class MissingGlyph(Exception):
    """A text with a character that no font of the typeface covers.

    Attributes:
      character: first such character.
    """

    def __init__(self, character: str):
        super().__init__(f"U+{ord(character):04X}")
        self.character = character


@dataclass(frozen=True)
class FontFile:
    """A font file, and the index of the font inside a collection."""

    path: str
    index: int = 0


@dataclass(frozen=True)
class Typeface:
    """The fonts for a script: first the script's font, then the font for all other characters.

    Attributes:
      style: `sans-serif`, `serif`, or a style of the script such as `Naskh`.
    """

    script: Script
    style: str
    bold: bool
    files: tuple[FontFile, ...]

    def runs(self, text: str, language: str) -> tuple[tuple[FontFile, str], ...]:
        """Divides a line, in logical order, into runs of one font each.

        The font changes between characters of the script and all others. Among the others it changes at spaces if
        possible, so that a number with its signs is one run, and runs of a right-to-left line can be drawn one by one.

        Raises:
          MissingGlyph: with the first character that no font covers.
        """
        runs: list[tuple[FontFile, str]] = []
        for in_script, group in itertools.groupby(graphemes(text, language), self._is_in_script):
            run = "".join(group)
            whole = self._first(self.files[:1] if in_script else self.files, run)
            tokens = [run] if in_script or whole else [token for token in re.split("([ \u00a0]+)", run) if token]
            for token in tokens:
                file = whole or self._first(self.files, token)
                if file is None and (in_script or self.script.rtl):
                    raise MissingGlyph(next(c for c in token if not covers(self.files[0], c)))
                if file is not None:
                    runs.append((file, token))
                    continue
                for cluster in graphemes(token, language):
                    file = self._first(self.files, cluster)
                    if file is None:
                        raise MissingGlyph(next((c for c in cluster if not self._first(self.files, c)), cluster[-1]))
                    runs.append((file, cluster))
        return tuple(
            (file, "".join(run for _, run in group)) for file, group in itertools.groupby(runs, lambda run: run[0])
        )

    @staticmethod
    def _first(files: tuple[FontFile, ...], text: str) -> FontFile | None:
        return next((file for file in files if covers(file, text)), None)

    def _is_in_script(self, cluster: str) -> bool:
        return any(unicodedata.script(character) in self.script.unicode for character in cluster)


class FontLibrary:
    """The typefaces of some scripts.

    Args:
      scripts: scripts that need fonts.
      folders: folders to search for fonts.
      hint: end of the error message for a missing font, with other remedies.

    Raises:
      ValueError: if a font is missing (the message names its Debian package), or if Pillow cannot shape text.
    """

    def __init__(self, scripts: tuple[Script, ...], folders: tuple[Path, ...] = FOLDERS, hint: str = FONTS_HINT):
        if not features.check("raqm"):
            raise ValueError("this Pillow was built without libraqm, which shapes text; install Pillow's own wheel")
        self.typefaces: dict[str, tuple[Typeface, ...]] = {}
        for script in scripts:
            typefaces = []
            for style, name in script.typefaces:
                for weight in ("Regular", "Bold"):
                    other = f"{'NotoSerif' if style.startswith('serif') else 'NotoSans'}-{weight}"
                    names = [f"{name}-{weight}"] if script.face else list(dict.fromkeys((f"{name}-{weight}", other)))
                    files = tuple(_find(name, script, folders, hint) for name in names)
                    typefaces.append(Typeface(script, style, weight == "Bold", files))
            self.typefaces[script.code] = tuple(typefaces)


def _find(name: str, script: Script, folders: tuple[Path, ...], hint: str) -> FontFile:
    suffix = ".ttc" if script.face else ".ttf"
    for folder in folders:
        path = folder / (name + suffix)
        if path.is_file():
            return FontFile(str(path), _face_index(str(path), script.face) if script.face else 0)
    listed = ", ".join(str(folder) for folder in folders)
    raise ValueError(
        f"the font {name}{suffix} of {script.name} ({script.code}) is in none of the folders {listed}; "
        f"apt-get install {script.package}{hint}"
    )


@functools.cache
def _face_index(path: str, face: str) -> int:
    with TTCollection(path, lazy=True) as collection:
        for index, font in enumerate(collection.fonts):
            if font["name"].getDebugName(1).endswith(f" {face}"):
                return index
    raise ValueError(f"{path} has no face for {face}")


@functools.cache
def _characters(file: FontFile) -> frozenset[int]:
    with TTFont(file.path, fontNumber=file.index, lazy=True) as font:
        return frozenset(font.getBestCmap())


def covers(file: FontFile, text: str) -> bool:
    """Whether a font has a glyph for every character of a text."""
    characters = _characters(file)
    return all(ord(character) in characters or character in JOINERS for character in text)


@functools.lru_cache(maxsize=256)
def at_size(file: FontFile, size: int) -> ImageFont.FreeTypeFont:
    """Loads a font at a size in pixels per em."""
    return ImageFont.truetype(file.path, size, index=file.index, layout_engine=ImageFont.Layout.RAQM)
