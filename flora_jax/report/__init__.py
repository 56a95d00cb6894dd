"""What a person sees of a finished run: pictures and tables."""
