"""The commands: what tools/*.py and an installed package run."""
