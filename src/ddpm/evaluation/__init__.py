"""Judging samples: features, distances between sets of images, memorization, likelihood."""
