"""Images for training and evaluation: sources, splits, augmentations and batches."""
