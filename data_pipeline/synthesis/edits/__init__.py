"""Exact edit pairs made from real pictures."""
