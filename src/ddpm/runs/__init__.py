"""Run folders: which folder a run has, how it is resumed."""
