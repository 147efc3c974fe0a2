"""Exact judgement of a model: metrics, calibration, prediction."""
