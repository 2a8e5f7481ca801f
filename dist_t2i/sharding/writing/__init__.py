"""How a set is written."""
