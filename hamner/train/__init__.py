"""Pre-training: the step, the loop around it, and what a long run must survive."""
