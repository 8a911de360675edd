"""Detectors of every family: pixels to boxes with class vectors. Nothing here knows Ray."""
