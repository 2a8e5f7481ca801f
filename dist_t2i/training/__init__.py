"""Training: the loop, the adversarial step, and the parts it is built from."""
