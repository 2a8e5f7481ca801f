"""Averages of the steps' metrics and times between two reports."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Meter:
    """Averages metrics without synchronizing with the device: tensors are summed on their device and read in `take`."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums: defaultdict[str, float | Tensor] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._images = self._steps = 0
        self._begin = time.perf_counter()

    def waiting(self) -> AbstractContextManager[None]:
        """A context manager: the time inside it counts as waiting for data."""
        return self._timed("waiting")

    def paused(self) -> AbstractContextManager[None]:
        """A context manager for work between steps, such as a checkpoint: the rates exclude the time inside it."""
        return self._timed("paused")

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - begin

    def add(self, images: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Add a step of `images` over all ranks. A metric is averaged over the steps that report it."""
        self._images += images
        self._steps += 1
        for name, value in metrics.items():
            number = value if isinstance(value, (int, float)) else value.detach().float()
            self._sums[name] = self._sums[name] + number
            self._counts[name] += 1

    def sums(self, all_reduce_mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, tuple[float, int]]:
        """The sum over the steps since the last `take`, and their number, for each metric. For `all_reduce_mean` see
        `take`: the sum is averaged over the ranks."""
        import torch

        names = sorted(self._sums)
        values = [torch.as_tensor(self._sums[name], dtype=torch.float64, device="cpu") for name in names]
        vector = torch.stack(values) if values else torch.empty(0, dtype=torch.float64)
        if all_reduce_mean is not None and values:
            vector = all_reduce_mean(vector)
        return {name: (total, self._counts[name]) for name, total in zip(names, vector.tolist(), strict=True)}

    def restore(self, sums: Mapping[str, tuple[float, int]]) -> None:
        """Continue from what `sums` returned. Times start anew."""
        self._restart()
        for name, (total, count) in sums.items():
            self._sums[name], self._counts[name] = total, count
            self._steps = max(self._steps, count)

    def take(self, all_reduce_mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The averages since the last call; then averaging starts anew. Collective if `all_reduce_mean` is collective.

        `all_reduce_mean` averages a float64 CPU vector over the ranks, so that all ranks get the same numbers. Adds
        `images_per_second`, `seconds_per_step`, and `data_wait` (a share of the time, 0 to 1). Returns {} if no step
        was added.
        """
        import torch

        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._begin - self._seconds["paused"], 1e-9)
        sums = self.sums()
        times = [seconds, min(self._seconds["waiting"], seconds)]
        vector = torch.tensor([*(total for total, _ in sums.values()), *times], dtype=torch.float64)
        if all_reduce_mean is not None:
            vector = all_reduce_mean(vector)
        *totals, seconds, waited = vector.tolist()
        means = {name: total / count for (name, (_, count)), total in zip(sums.items(), totals, strict=True)}
        rates = {"images_per_second": self._images / seconds, "seconds_per_step": seconds / self._steps}
        self._restart()
        return {**means, **rates, "data_wait": waited / seconds}
