"""This package has the training step, the loop around it, and what a long run must survive."""
