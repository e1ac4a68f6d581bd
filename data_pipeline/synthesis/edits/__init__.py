"""Exact edit pairs made from real images."""
