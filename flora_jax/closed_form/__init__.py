"""Closed-form compression (ours): smaller without labels or training."""
