"""The package keeps saved state: its format, its writers, a run's folder, the models in it."""
