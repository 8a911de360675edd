"""From tiles to soft labels, on Ray Data."""
