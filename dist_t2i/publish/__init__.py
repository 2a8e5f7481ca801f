"""Exported models and pages for people."""
