"""Turns sets of captioned pictures into batches. Contains the shards, their indexes, the order of samples, remote reads
and decoding."""
