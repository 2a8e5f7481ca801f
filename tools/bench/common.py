"""The clock, medians and tables of the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def now(device: torch.device) -> float:
    """Waits until the device has finished its work; returns the seconds of a monotonic clock."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_of(runs: Iterable[Mapping[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def print_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the first column left-aligned and the others right-aligned, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print(f"\n{caption}")
    for first, *cells in (heads, *rows):
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *aligned]), flush=True)
