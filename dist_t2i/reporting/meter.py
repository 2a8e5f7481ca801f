"""Averages of a step's numbers and of its time, between two reports. Every rank has one; `take` brings them together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Meter:
    """Collects metrics without waiting for the device: tensors are summed where they are, and read once in `take`."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (a checkpoint, a sample grid) does not count at all."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def add(self, images: int, metrics: Mapping[str, float | Tensor]) -> None:
        """One step of `images` images, over all ranks. A metric that not every step has is averaged over those that do.

        Tensors are scalars; they are detached, and averaged over the ranks later (so give means over this rank's rows).
        """
        self._images += images
        self._steps += 1
        for name, value in metrics.items():
            number = value if isinstance(value, (int, float)) else value.detach().float()
            self._sums[name] = self._sums.get(name, 0.0) + number
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, all_reduce_mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The averages since the last call, and begin anew. Collective if `all_reduce_mean` is.

        `all_reduce_mean` averages a float64 CPU vector over the ranks: all of them get the same numbers, so that all
        come to the same verdict. Beside the metrics: `images_per_second`, `seconds_per_step`, and `data_wait` (the
        share of the time, 0 to 1). Empty before the first `add`.
        """
        import torch

        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        names = sorted(self._sums)
        values = [torch.as_tensor(self._sums[name], dtype=torch.float64, device="cpu") for name in names]
        times = torch.tensor([seconds, min(self._waited, seconds)], dtype=torch.float64)
        vector = torch.cat([torch.stack(values), times]) if values else times
        if all_reduce_mean is not None:
            vector = all_reduce_mean(vector)
        *sums, seconds, waited = vector.tolist()
        means = {name: total / self._counts[name] for name, total in zip(names, sums, strict=True)}
        means["images_per_second"] = self._images / seconds
        means["seconds_per_step"] = seconds / self._steps
        means["data_wait"] = waited / seconds
        self._restart()
        return means
