"""Text-rich images with exact captions."""
