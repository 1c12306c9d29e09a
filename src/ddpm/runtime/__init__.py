"""The machine: devices, processes, memory, randomness, signals."""
