"""What a person sees of a run: tables, pictures, and the page."""
