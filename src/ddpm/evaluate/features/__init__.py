"""Features that distances between sets of images are measured in."""
