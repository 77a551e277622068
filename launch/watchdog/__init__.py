"""What keeps a run alive, and what is said when it ends: signals, ranks that are lost or hang, verdicts,
faults on purpose.
"""
