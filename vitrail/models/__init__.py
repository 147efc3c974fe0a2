"""The Vision Transformer: encoder, Transformer, decoder, and their configuration. Knows no devices or logs."""
