"""Weights as other libraries keep them: each format is read here, and written where that makes sense."""
