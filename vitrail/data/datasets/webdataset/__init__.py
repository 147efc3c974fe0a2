"""Datasets in WebDataset tar shards, on this machine or at an address."""
