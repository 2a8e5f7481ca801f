"""Writes captioned pictures as a set of shards (tools/shard.py), and inspects such sets. The package `data` reads them
for training."""
