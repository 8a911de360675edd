"""Tiles to soft labels, on Ray Data."""
