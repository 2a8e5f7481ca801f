"""Checkpoints, which a run writes atomically under a lease, copies to a mirror, and resumes from."""
