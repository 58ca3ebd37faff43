"""This package holds the configuration of runs; it is torch-free."""
