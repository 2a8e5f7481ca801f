"""Reads and writes files on local disks, in object stores and on web servers."""
