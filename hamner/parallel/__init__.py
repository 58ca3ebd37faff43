"""The package has the device, the processes of a job, and their engines: DDP and FSDP2."""
