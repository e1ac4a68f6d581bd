"""Fonts, scripts, line breaks and typesetting."""
