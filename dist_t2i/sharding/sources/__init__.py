"""Each module reads captioned pictures from one kind of input."""
