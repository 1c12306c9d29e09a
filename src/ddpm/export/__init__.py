"""A model in other tools' formats."""
