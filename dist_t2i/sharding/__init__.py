"""Captioned pictures become a set of shards (tools/shard.py): sources, filters, writing, checking. `data` reads them."""
