"""Feature networks: pictures and texts to vectors."""
