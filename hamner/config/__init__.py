"""What a run is told, torch-free."""
