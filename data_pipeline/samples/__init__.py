"""Encoded samples: their format, the cache, and the encoding that writes it."""
