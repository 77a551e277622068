"""Where the time of a training step goes: what `rankzero profile` measures, and what it prints.

The command, from top to bottom:

    profile_run.py      a run, measured instead of trained
    measure.py          steps of the run under torch.profiler, and their times on every rank
    events.py           what the profiler's events mean: compute, communication, copies, operations
    timeline.py         intervals on one clock: how much of the communication is exposed
    step_table.py       the tables that rank zero prints
    key_suggestions.py  the keys that may help
"""
