"""What a person sees of a run: progress, plots and tables."""
