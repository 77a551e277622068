"""Runs as SLURM jobs: `train.sbatch`, and `rankzero submit`, which makes scripts of it. No torch."""
