"""Compare runs, and settings of one sampler: tables, plots, contact sheet."""
