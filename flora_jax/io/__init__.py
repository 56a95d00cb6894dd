"""Reading and writing: checkpoints of a run, folders of a finished model, files that stay whole."""
