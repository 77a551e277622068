"""A process among the ranks of a run: who takes part, how they meet, what they exchange."""
