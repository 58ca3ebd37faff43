"""This package holds runs' configuration, torch-free: `--help` and every refusal come at once."""
