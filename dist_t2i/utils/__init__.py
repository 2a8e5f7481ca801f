"""Small helpers that any project could use: files, random numbers, processes, tensors, progress."""
