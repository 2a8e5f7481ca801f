"""The networks: plain modules without training logic, randomness or statistics over the batch."""
