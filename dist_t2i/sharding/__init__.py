"""Writes captioned pictures as a set of shards (tools/shard.py), and inspects sets. The package `data` reads them."""
