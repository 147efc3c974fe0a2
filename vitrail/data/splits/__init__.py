"""Assign images to splits: train, val and test, or the folds of a cross-validation."""
