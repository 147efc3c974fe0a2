"""Exact evaluation of a model: metrics, calibration, prediction."""
