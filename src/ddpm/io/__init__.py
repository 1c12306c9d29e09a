"""Reading and writing files: bounded, atomic, cached."""
