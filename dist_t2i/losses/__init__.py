"""Losses as pure functions, and the contrast over the global batch."""
