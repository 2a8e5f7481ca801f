"""Reads the files of trained models, and makes pictures with the models."""
