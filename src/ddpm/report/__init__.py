"""What came of a set of runs: tables, plots, pictures."""
