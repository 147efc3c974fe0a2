"""Datasets of labelled images, one module for each kind of DATA."""
