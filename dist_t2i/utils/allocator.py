"""Keeps glibc from returning freed memory to the system.

glibc returns the memory of a large array to the system when the array is freed. The next large array then gets new
pages, which the kernel must first fill with zeros. Training steps with ZeRO and feature networks on a CPU allocate many
large arrays. Measured gains: EfficientNet-Lite0 on one thread processes 38 pictures/s instead of 19; on two ranks, the
time of a step relative to plain PyTorch falls from 1.10 to 1.03 (ZeRO stage 1), and from 1.11 to 1.09 (stage 2).
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 256 * 2**20
"""The process keeps up to this many bytes of free memory at the top of the heap."""
LARGEST = 32 * 2**20
"""Arrays of up to this many bytes (glibc's maximum) are allocated on the heap, whose memory can be kept."""


@functools.cache
def keep_freed_memory() -> bool:
    """Lets this process keep up to 256 MB of freed memory. Returns True on success, which requires glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # a C library without mallopt, no C library, or Windows
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(_M_MMAP_THRESHOLD, LARGEST))
