"""Learning from a teacher: its predictions, once and kept on disk, or in every step."""
