"""Hamner: pre-train a small language model from scratch on one consumer GPU."""

__version__ = "0.2.0"
