"""Weights in and out: the names of other libraries, saved models, exports."""
