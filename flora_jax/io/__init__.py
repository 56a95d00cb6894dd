"""Files that stay whole: checkpoints, manifests, JSON and JSON lines, on disk and in a bucket."""
