"""Scores of what generated pictures show: attributes that captions name, and attributes that they leave open."""
