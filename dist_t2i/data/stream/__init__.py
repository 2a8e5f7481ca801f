"""The stream of batches: samples are ordered by a function of (seed, images seen), then read, decoded and batched."""
