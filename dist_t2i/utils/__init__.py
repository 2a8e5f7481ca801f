"""Small helpers without any idea of the project's own: files, seeds, processes, tensors, progress."""
