"""Synthetic records with exact captions: text in pictures, and edit pairs."""
