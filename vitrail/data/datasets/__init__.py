"""Labelled images, wherever they come from: what DATA may be."""
