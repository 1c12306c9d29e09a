"""Datasets, one file each; what every dataset returns; batches."""
