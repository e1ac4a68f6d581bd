"""OCR reads the drawn text as it was meant, in ten languages."""

import pytest

from tests import debian, ocr


@pytest.mark.parametrize("language", ocr.LANGUAGES)
def test_clean_lines_are_read_back(language):
    ocr.require(language)
    with ocr.Reader(language) as reader:
        scores = [ocr.similarity(text, reader.read(image)) for text, image in ocr.draw_lines(language, 6)]
    assert sum(scores) / len(scores) >= 0.95


def test_similarity_is_one_less_the_share_of_edits():
    assert ocr.similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert ocr.similarity("abc", "") == 0.0
    assert ocr.similarity(" a  b\n", "a b") == 1.0
    assert ocr.similarity("日 本 語", "日本語") == 1.0


def test_what_is_missing_is_skipped_by_name_and_fails_under_ci(monkeypatch, tmp_path):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install tesseract-ocr-eng"):
        debian.require_debian("tesseract-ocr-eng", tmp_path / "missing")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install tesseract-ocr-eng"):
        debian.require_debian("tesseract-ocr-eng", tmp_path / "missing")
    debian.require_debian("tesseract-ocr-eng", tmp_path)
    with pytest.raises(ValueError, match=r"not listed in apt-packages\.txt"):
        debian.require_debian("unheard-of", tmp_path)
