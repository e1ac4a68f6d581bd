"""Synthetic records with exact captions: one module per kind, each with its arguments and its command."""
