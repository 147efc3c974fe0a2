"""What can be wrong with a dataset: broken files, copies, leaks, class names, unusual images."""
