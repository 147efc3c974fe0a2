"""From a dataset to batches, for training and for evaluation."""
