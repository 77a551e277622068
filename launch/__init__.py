"""A run: what the user starts, and the machinery under it."""
