"""Unicode's line, sentence, word and character boundaries, from ICU.

ICU breaks Thai with a dictionary, and never begins a Chinese or Japanese line with closing punctuation.
"""

from collections.abc import Callable

from icu4py.breakers import CharacterBreaker, LineBreaker, SentenceBreaker, WordBreaker


def graphemes(text: str, language: str) -> list[str]:
    """The user-perceived characters; a letter with its marks is one character."""
    return list(CharacterBreaker(text, language))


def sentences(text: str, language: str) -> list[str]:
    """The sentences, each with the space after it."""
    return list(SentenceBreaker(text, language))


def break_lines(text: str, language: str, width: float, measure: Callable[[str], float]) -> list[str] | None:
    """Breaks a text into lines greedily.

    Args:
      text: text to break.
      language: BCP 47 tag of the text.
      width: width of a line, in the unit of `measure`.
      measure: function that returns the length of a piece of text. Lengths of pieces between break opportunities are
        summed, since no script joins letters across one.

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
    """The longest prefix that fits and ends with a sentence, or else with a word; None if no word fits."""
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
