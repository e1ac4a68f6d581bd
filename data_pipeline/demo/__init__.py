"""The embedded images of the demo."""
