"""Scores of all filters and pairs of near duplicates: cascade, score tables, Beam."""
