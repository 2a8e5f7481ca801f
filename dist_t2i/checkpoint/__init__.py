"""Checkpoints: written atomically under a lease, mirrored, resumed."""
