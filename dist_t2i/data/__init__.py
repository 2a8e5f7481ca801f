"""Turns sets of captioned pictures into batches: shards, their indexes, the order, remote reads and decoding."""
