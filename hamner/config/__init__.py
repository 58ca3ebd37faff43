"""This package is the configuration of runs; it is torch-free."""
