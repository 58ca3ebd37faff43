"""The package writes models in other people's formats."""
