"""Compiled kernels. `group_norm.normed` is the one function to call; `group_norm.plain` is its twin in PyTorch."""
