"""A set of captioned pictures as a stream of batches: shards and their index, order, reading from afar, decoding."""
