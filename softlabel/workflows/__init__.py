"""Chains of steps, each a command of its own: the experiment, the search, what is in the imagery."""
