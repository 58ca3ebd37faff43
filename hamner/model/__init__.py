"""The package has the transformer, its operations, what it keeps for backward, and generation."""
