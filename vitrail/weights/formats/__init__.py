"""Weights of other libraries: each format is read here, and written where the library can read it back."""
