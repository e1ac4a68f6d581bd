"""Synthetic records with exact captions: text in images, and edit pairs."""
