"""The steps of writing a set: find duplicates, prepare pictures, write tars and shards, and write the report and
manifest."""
