"""Experiment configs: loading, overriding, and comparing them with the config a folder was created with."""
