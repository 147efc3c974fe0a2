"""Which image is in which split: train, val or test, or a fold of a cross-validation."""
