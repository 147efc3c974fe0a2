"""Decode image files and bring them to the model's input; no code here knows datasets."""
