"""Trained weights: Vitrail's own model file, and models of other libraries, read into it and written from it."""
