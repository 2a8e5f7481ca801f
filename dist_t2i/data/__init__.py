"""A set of captioned pictures as a stream of batches: shards, their indexes, the order, remote reads and decoding."""
