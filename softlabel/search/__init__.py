"""Threshold to student mAP: which confidence threshold makes the best student."""
