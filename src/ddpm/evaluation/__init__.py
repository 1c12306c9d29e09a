"""How good images are: figures of two sets of images or features, each with the error it carries."""
