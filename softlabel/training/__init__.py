"""Training on truth or soft labels, with Ray Train."""
