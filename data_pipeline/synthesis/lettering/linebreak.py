"""Unicode's line, sentence, word and character boundaries, as ICU finds them.

ICU breaks Thai with a dictionary and does not begin a Chinese or Japanese line with closing punctuation.
"""

from collections.abc import Callable

from icu4py.breakers import CharacterBreaker, LineBreaker, SentenceBreaker, WordBreaker


def graphemes(text: str, language: str) -> list[str]:
    """The user-perceived characters: a letter with its marks is one."""
    return list(CharacterBreaker(text, language))


def sentences(text: str, language: str) -> list[str]:
    """The sentences, each with the space after it."""
    return list(SentenceBreaker(text, language))


def break_lines(text: str, language: str, width: float, measure: Callable[[str], float]) -> list[str] | None:
    """Fills lines greedily.

    Args:
      width: width of a line, in the unit of `measure`.
      measure: returns the length of a piece of text. Lengths of pieces between break opportunities are summed, since no
        script joins letters across one.

    Returns:
      The lines, without the spaces at their ends; None if an unbreakable piece is wider than a line.
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
    """The longest prefix that fits and ends with a sentence, or else with a word; None if not even one word fits."""
    if fits(text):
        return text
    for breaker in (SentenceBreaker, WordBreaker):
        pieces = list(breaker(text, language))
        low, high = 0, len(pieces) - 1  # bisection: the first `low` pieces fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits("".join(pieces[:middle]).rstrip()) else (low, middle - 1)
        # A prefix must not end with an opening bracket or a comma.
        if beginning := "".join(pieces[:low]).rstrip().rstrip("([{“‘«「『（《,、，،"):
            return beginning.rstrip()
    return None
