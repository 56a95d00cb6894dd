"""A run: its settings, its folder, its images, and the checks before it."""
