"""Sampling: the trained model, the sampler, the tasks of ddpm-sample, and a user's images."""
