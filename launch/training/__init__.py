"""The run: the trainer, its loop, its directory."""
