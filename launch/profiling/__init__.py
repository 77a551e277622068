"""Where the time of a step goes: what `rankzero profile` measures, and what it says of it."""
