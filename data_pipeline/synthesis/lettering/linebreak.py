"""Where text may be divided: Unicode's line, sentence, word and character boundaries, as ICU finds them.

ICU breaks Thai by its dictionary and keeps closing punctuation off the beginning of a line in Chinese and Japanese.
"""

from collections.abc import Callable

from icu4py.breakers import CharacterBreaker, LineBreaker, SentenceBreaker, WordBreaker


def graphemes(text: str, language: str) -> list[str]:
    """What a reader takes for characters: a letter with its marks is one."""
    return list(CharacterBreaker(text, language))


def sentences(text: str, language: str) -> list[str]:
    """The sentences, each with the space behind it."""
    return list(SentenceBreaker(text, language))


def break_lines(text: str, language: str, width: float, measure: Callable[[str], float]) -> list[str] | None:
    """Fills lines greedily.

    Args:
      width: of a line, in the unit of `measure`, which gives the length of a piece of text. Lengths of pieces between
        break opportunities are added up: no script joins letters over one.

    Returns:
      The lines, without the spaces at their ends; None when a piece that must not be divided is wider than a line.
    """
    lines, line, length = [], "", 0.0
    for piece in LineBreaker(text, language):
        visible = measure(piece.rstrip())
        if visible > width:
            return None
        if line and length + visible > width:
            lines.append(line.rstrip())
            line, length = "", 0.0
        line += piece
        length += measure(piece)
    return [*lines, line.rstrip()] if line.strip() else lines


def shorten(text: str, language: str, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning that fits and ends with a sentence, or else with a word; None when not one word fits."""
    if fits(text):
        return text
    for breaker in (SentenceBreaker, WordBreaker):
        pieces = list(breaker(text, language))
        low, high = 0, len(pieces) - 1  # bisection: the first `low` pieces fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits("".join(pieces[:middle]).rstrip()) else (low, middle - 1)
        # A word is no end behind an opening bracket, nor before its own full stop.
        if beginning := "".join(pieces[:low]).rstrip().rstrip("([{“‘«「『（《,、，،"):
            return beginning.rstrip()
    return None
