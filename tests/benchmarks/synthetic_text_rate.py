"""Rate of `qi2 data synth text` on one core, per strategy: `python -m tests.benchmarks.synthetic_text_rate [SAMPLES]`.

Beside each the share that the encoding of the finished pictures takes, measured in the same run.
"""

import io
import sys
import time

from PIL import Image

from data_pipeline.synthesis.lettering.fonts import FontLibrary
from data_pipeline.synthesis.lettering.scripts import SCRIPTS
from data_pipeline.synthesis.text.corpus import BuiltinCorpus
from data_pipeline.synthesis.text.scenes import Scenes
from data_pipeline.synthesis.text.synthesis import SOURCE, STRATEGIES, Recipe


def main(samples: int) -> None:
    scripts = tuple(SCRIPTS.values())
    fonts, scenes = FontLibrary(scripts), Scenes()
    print(f"{'strategy':8} {'side':>5} {'img/s':>6} {'encoding':>9} {'kB':>5}")
    for strategy in STRATEGIES:
        for side in (512, 1024) if strategy in ("pure", "layout") else (None,):  # the others have sizes of their own
            recipe = Recipe(0, (strategy,), scripts, fonts, BuiltinCorpus(), scenes, side or 512, SOURCE)
            for number in range(len(scripts)):  # fonts, tables and the tokenizer are loaded once per process
                recipe.make(number)
            start = time.process_time()
            made = [recipe.make(len(scripts) + number)[2] for number in range(samples)]
            seconds = time.process_time() - start
            records = [record for record in made if record is not None]
            pictures = [Image.open(io.BytesIO(record.image)) for record in records]
            formats = [picture.format for picture in pictures]
            loaded = [picture.convert("RGB") for picture in pictures]
            start = time.process_time()
            for picture, format in zip(loaded, formats, strict=True):
                options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
                picture.save(io.BytesIO(), format, **options)
            encoding = time.process_time() - start
            size = sum(len(record.image) for record in records) / len(records) / 1000
            print(
                f"{strategy:8} {side or '-':>5} {len(records) / seconds:6.1f} {encoding / seconds:9.0%} {size:5.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 57)
