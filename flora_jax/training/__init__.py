"""Training: one function that every stage uses."""
