"""From a folder of pictures to batches: sources, splits, decode, preprocessing, augmentation, loading."""
