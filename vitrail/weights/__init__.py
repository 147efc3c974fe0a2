"""Weights on disk: the self-describing model file."""
