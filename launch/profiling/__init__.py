"""Where the time of a step goes: what `launch/profile.py` measures, and what it says of it."""
