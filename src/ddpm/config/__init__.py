"""What a user may type: the schema, the choices, their limits, and Hydra."""
