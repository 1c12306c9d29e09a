"""How good images are: every figure with its error, its floor and its cost."""
