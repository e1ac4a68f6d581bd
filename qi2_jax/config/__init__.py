"""Experiment configs.

`loading` reads an experiment file and applies overrides, `parsing` turns the result into frozen dataclasses, `fields`
declares properties of their keys, `changes` compares two configs, and `recorded` keeps the config that a folder was
created with.
"""
