"""A trained model: its files, and making pictures with it."""
