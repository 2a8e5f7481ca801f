"""Feature networks that score pictures."""
