"""Datasets: what one is, one file for each, and the batches made of them."""
