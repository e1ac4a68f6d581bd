"""From a folder of images and captions to selected, bucketed, prepared images; usable without the trainer.

In the order in which data passes through:

- `ingest`: a folder of images and captions becomes shards of records (`records`, `shards`).
- `cascade`: filters (`filters/`) write score columns beside the shards (`scores`); nothing is deleted.
- `selection`: thresholds turn scores into the list of kept records and a funnel that says why the others left.
- `buckets`, `prepare`: sizes of equal area and many ratios, and the image resized and cropped to one of them.
- `demo_set`: a small folder of real photographs and rendered words, with every kind of bad picture planted in it.
"""
