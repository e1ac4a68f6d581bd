"""How well OCR reads synthetic text back, per language: `python -m tests.benchmarks.synthetic_text_ocr [LINES]`.

Clean lines of 44 pixels per em, black on white, drawn by the typesetting of `qi2 data synth text` from its built-in
corpus and read by Tesseract with Debian's language data. Similarity is 1 - edit distance / length.
"""

import sys

from tests import ocr


def main(lines: int) -> None:
    print(f"{'language':10} {'lines':>6} {'mean':>7} {'exact':>6}  worst line -> read as")
    for language in ocr.LANGUAGES:
        with ocr.Reader(language) as reader:
            read = [(text, reader.read(image)) for text, image in ocr.draw_lines(language, lines)]
        scores = [ocr.similarity(*pair) for pair in read]
        worst = min(range(lines), key=lambda index: scores[index])
        exact = sum(score == 1.0 for score in scores) / lines
        shown = " -> ".join(text.strip() for text in read[worst])
        print(
            f"{language:10} {lines:6} {sum(scores) / lines:7.4f} {exact:6.2f}  {scores[worst]:.3f} {shown}", flush=True
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
