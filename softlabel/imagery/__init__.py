"""From scenes and truth to tiles."""
