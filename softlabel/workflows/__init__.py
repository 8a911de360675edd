"""Chains of steps, each a command of its own: the experiment, the search, the comparison, what is in the imagery."""
