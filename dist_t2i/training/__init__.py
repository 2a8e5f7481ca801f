"""Training: the loop, the adversarial step, and the other parts of a run."""
