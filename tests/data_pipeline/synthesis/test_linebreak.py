"""Lines and prefixes never end inside a character or where the script forbids a break."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.synthesis.lettering.linebreak import break_lines, graphemes, shorten

SAMPLES = {
    "en": "A well-known cat, isn't it? It costs 3.50 (or more) today.",
    "ja": "これは、とても「長い」文です。東京都で（今日）会いましょう！ラーメン、カレー、ギョーザ。",
    "zh-Hans": "图书馆有这些语言的书：立陶宛语、《史记》和“其他”。价格是12.5欧元。",
    "th": "ห้องสมุดมีหนังสือในภาษาต่อไปนี้ ได้แก่ ภาษาญี่ปุ่นและภาษาเกาหลี",
    "hi": "पुस्तकालय में इन भाषाओं की किताबें हैं: क्षत्रिय, स्त्री।",
    "ar": "في المكتبة كتب بهذه اللغات: العربية والفرنسية.",
    "ko": "도서관에는 다음 언어로 된 책이 있습니다: 일본어.",
}


def width_of(language):
    return lambda piece: float(len(graphemes(piece, language)))


@pytest.mark.parametrize("language", SAMPLES)
@pytest.mark.parametrize("width", [14, 19, 26])
def test_lines_hold_the_text_and_fit(language, width):
    text = SAMPLES[language]
    lines = break_lines(text, language, width, width_of(language))
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(len(graphemes(line, language)) <= width for line in lines)
    assert len(lines) > 1


@pytest.mark.parametrize("language", ["ja", "zh-Hans"])
@pytest.mark.parametrize("width", range(4, 24))
def test_no_line_begins_with_closing_or_ends_with_opening_punctuation(language, width):
    lines = break_lines(SAMPLES[language], language, width, width_of(language)) or []
    assert not any(line[0] in "、。，．！？：」』）》”" for line in lines)
    assert not any(line[-1] in "「『（《“" for line in lines)


def test_thai_is_broken_only_between_words():
    lines = break_lines(SAMPLES["th"], "th", 9, width_of("th"))
    assert lines[:3] == ["ห้องสมุดมี", "หนังสือใน", "ภาษาต่อไปนี้"]


def test_a_word_wider_than_a_line_is_not_divided():
    assert break_lines("an incomprehensible word", "en", 10, width_of("en")) is None


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=40), st.integers(1, 12)
)
def test_no_character_is_ever_divided(text, width):
    lines = break_lines(text, "en", width, width_of("en"))
    if lines is not None:
        assert [cluster for line in lines for cluster in graphemes(line, "en")] == graphemes(text, "en")


def test_shortening_prefers_sentences_to_words():
    text = "One sentence. Another one, longer. A third."
    assert shorten(text, "en", lambda beginning: len(beginning) <= 36) == "One sentence. Another one, longer."
    assert shorten(text, "en", lambda beginning: len(beginning) <= 9) == "One"
    assert shorten(text, "en", lambda beginning: len(beginning) <= 100) == text
    assert shorten(text, "en", lambda beginning: len(beginning) <= 2) is None


@pytest.mark.parametrize("language", SAMPLES)
def test_every_shortened_text_is_a_beginning_of_whole_characters(language):
    text = SAMPLES[language]
    for most in range(1, len(text)):
        beginning = shorten(text, language, lambda part, most=most: len(part) <= most)
        if beginning is not None:
            assert text.startswith(beginning) and len(beginning) <= most
            clusters = graphemes(beginning, language)
            assert clusters == graphemes(text, language)[: len(clusters)]
