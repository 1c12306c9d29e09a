"""Compiled kernels, each beside its plain twin."""
