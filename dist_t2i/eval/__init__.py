"""Evaluation: feature networks, metrics (pure functions), and the frozen protocols that combine them."""
