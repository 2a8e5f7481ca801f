"""Writes captioned pictures as a set of shards (tools/shard.py), and inspects such a set. Training reads it with
`data`."""
