"""Queue runs on SLURM: the batch script, and `rankzero submit`, which fills it in."""
