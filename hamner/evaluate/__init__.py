"""The package says what a model is worth: held-out loss, samples, lm-evaluation-harness."""
