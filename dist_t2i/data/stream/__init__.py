"""The stream of batches: an order that is a function of (seed, images seen), read, decoded and batched."""
