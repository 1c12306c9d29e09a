"""How good a model's images are: each figure with its error, its floor and its cost."""
