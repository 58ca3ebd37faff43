"""Saved state: its format, what writes it, a run's folder, and models found in it."""
