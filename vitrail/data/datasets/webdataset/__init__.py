"""Datasets in tar shards, on this machine or at an address."""
