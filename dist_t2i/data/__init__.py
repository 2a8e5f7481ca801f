"""Captioned pictures: from files to shards (`openmoji`, `folder`, `writer`), from shards to batches (`stream`)."""
