"""The main job: from a folder of captioned images to a diffusers pipeline.

`data` selects and buckets images, `models` makes the parts around the transformer, `encode` turns images and captions
into samples, `stages` trains, `results` draws and measures, `verify` compares with PyTorch, `main` runs it all.
"""
