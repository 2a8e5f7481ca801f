"""The steps of writing a set: pictures, tars, shards, duplicates, report, manifest."""
