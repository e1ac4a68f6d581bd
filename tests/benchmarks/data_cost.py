"""CPU time per image of every filter, and what a million images then cost.

    python tests/benchmarks/data_cost.py [--price 0.05] [--images 64]

`--price` is what one core costs for an hour, in any currency. Photographs of scikit-image, at half a megapixel in JPEG.
CPU time is counted, not the clock, so that other load on the machine matters little; it still slows caches down.
"""

import argparse
import base64
import io
import os
import time

import numpy as np
from PIL import Image
from skimage import data

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Candidate
from data_pipeline.records.schema import Caption, Record
from data_pipeline.scoring.pairs import differences

SIZE = (816, 612)
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    photographs = [Image.fromarray(make()) for make in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    records = []
    for number in range(arguments.images):
        buffer = io.BytesIO()
        photographs[number % 4].resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80 + number % 8)
        caption = Caption("a photograph of something that can be seen, and words that say a little more about it")
        records.append(Record(str(number), buffer.getvalue(), (caption,), "benchmark"))

    seconds: dict[str, float] = {}
    for filter in CASCADE:
        if filter.can_score:
            filter.score([candidate(records[0])])  # loads its model
    for start in range(0, len(records), BATCH):
        batch = []
        with_time(seconds, "decode", lambda: batch.extend(map(candidate, records[start : start + BATCH])))
        for filter in CASCADE:
            if filter.can_score:
                with_time(seconds, filter.name, lambda: filter.score(batch))
    row = next(filter for filter in CASCADE if filter.name == "duplicates").score([candidate(records[0])])[0]
    thumbnail = np.frombuffer(base64.b64decode(row["thumbnail"]), np.uint8)[None].repeat(4096, 0)
    with_time(seconds, "confirm", lambda: differences(thumbnail, thumbnail))
    confirmed = seconds.pop("confirm") / 4096

    print(f"{os.cpu_count()} cores; CPU ms per image of {SIZE[0]} x {SIZE[1]}, core-hours and price per million")
    for name, spent in [*seconds.items(), ("all", sum(seconds.values()))]:
        each = spent / len(records)
        hours = each * 1e6 / 3600
        print(f"{name:>16} {1000 * each:>8.2f} {hours:>8.2f} {hours * arguments.price:>8.3f}")
    print(f"confirming a candidate pair: {1e6 * confirmed:.0f} microseconds")


def candidate(record: Record) -> Candidate:
    return Candidate(record, decode_image(record.image), None)


def with_time(seconds: dict[str, float], name: str, work) -> None:
    start = time.process_time()
    work()
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - start


if __name__ == "__main__":
    main()
