"""The package draws what runs wrote down: one run's pictures, or several runs in one."""
