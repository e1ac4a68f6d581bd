"""From a folder of images and captions to the batches of training; usable without the trainer.

In the order in which data passes through:

- `ingest`: a folder of images and captions becomes shards of records (`records`, `shards`).
- `cascade`: filters (`filters/`) write score columns beside the shards (`scores`); nothing is deleted.
- `pair_search`, `pairs`: which pictures are near to each other, a score too; `beam_scoring` does both on Apache Beam.
- `selection`: thresholds turn scores into the list of kept records and a funnel of reasons for the others (`rules`).
- `buckets`, `prepare`: sizes of equal area and many ratios, and the image resized and cropped to one of them.
- `encode`, `cache`, `samples`: what training reads, encoded once for each selection.
- `loader`, `mixture`: the batch of every step, a function of seed and step alone.
- `synthesis`: records made with exact captions, such as text in many scripts, and exact edit pairs of real pictures.
- `demo_set`: a small folder of real photographs and rendered words, with every kind of bad picture planted in it.
"""
