"""The file that holds a run: its header, reading and writing, where it lies, whether it fits."""
