"""Where the time of a step goes: what `launch/commands/profile.py` measures, and what it says of it."""
