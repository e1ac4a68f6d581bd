"""From a folder of images and captions to the batches of training; usable without the trainer.

In the order in which data passes through:

- `sources`: a folder of images and captions becomes shards of `records`.
- `scoring`: `filters` write score columns beside the shards, and near duplicates are found; nothing is deleted.
- `selection`: thresholds turn scores into the list of kept records, and a funnel of reasons for the others.
- `buckets`: image sizes of equal area and many aspect ratios.
- `samples`: what training reads, encoded once for each selection.
- `loading`: the batch of every step, a function of seed and step alone.
- `synthesis`: generated records with exact captions: text in many scripts, and edit pairs of real images.
- `demo`: a small folder of real photographs and rendered words, with every kind of bad image planted in it.
"""
