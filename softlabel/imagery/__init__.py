"""Scenes and truth to tiles."""
