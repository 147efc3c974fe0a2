"""From a folder of images to batches: sources, splits, decode, preprocessing, augmentation, loading."""
