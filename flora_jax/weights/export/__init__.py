"""Models out: files that other programs read."""
