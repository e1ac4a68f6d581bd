"""Evaluation of trained models against held-out images: metrics, the models that are compared, and their tables."""
