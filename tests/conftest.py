"""Puts this folder on sys.path (pytest does, because the file is here), so that all tests share its helper modules."""
