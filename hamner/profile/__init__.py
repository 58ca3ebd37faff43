"""The package traces warm steps of a run, and reads traces, also those of other trainers."""
