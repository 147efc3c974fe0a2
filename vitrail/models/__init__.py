"""Encoder → Transformer → Decoder. Knows no files, devices or logs."""
