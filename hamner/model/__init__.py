"""The transformer: its blocks, its operations, what it keeps for backward, how it generates."""
