"""One module for each kind of input that captioned pictures come in."""
