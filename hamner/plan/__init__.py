"""A plan says what a run will take: FLOPs, bytes, memory, time, loss; torch-free."""
