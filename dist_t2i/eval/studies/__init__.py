"""Studies of one model: edits and embeddings."""
