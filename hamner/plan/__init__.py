"""What a run will take: FLOPs, bytes, memory, time, loss; torch-free."""
