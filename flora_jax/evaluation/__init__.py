"""Metrics of models, and comparisons of two."""
