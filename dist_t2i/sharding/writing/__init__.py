"""The steps of writing a set: find duplicates, prepare pictures, write tars, shards, report and manifest."""
