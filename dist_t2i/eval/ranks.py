"""Evaluation on several processes, with the same result for any number of them.

Rows are divided into chunks of a fixed size, and each rank computes some of the chunks. A feature network therefore
gets the same batches on any number of ranks: features are bitwise equal on one rank and on four (with the same number
of threads). All ranks must call the functions that are marked "Collective".
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from dist_t2i.errors import UserError

T = TypeVar("T")
CHUNK = 32
"""Number of rows in a chunk."""
_TIMEOUT = datetime.timedelta(hours=12)
"""How long a rank waits for a slower rank, or for the metrics, which rank 0 computes."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among the `world` processes of an evaluation; by default, the only process."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, rank: int, world: int) -> Ranks:
        """Joins the other ranks. Uses gloo, because features are on the CPU; the environment gives the addresses."""
        if world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=_TIMEOUT)
        return cls(rank, world)

    def leave(self) -> None:
        """Waits for the other ranks and leaves the process group."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this rank computes the metrics and prints."""
        return self.rank == 0

    def collect(self, rows: int, compute: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
        """On rank 0, returns the tensors that `compute` returned for all chunks, concatenated along dimension 0 (the
        rows). On other ranks, returns {}.

        Collective. A UserError on any rank is raised on all ranks, and rank 0 prints the message.
        """
        parts = self.map(rows, compute, to_all=False)
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def map(self, rows: int, compute: Callable[[range], T], *, to_all: bool = True) -> list[T]:
        """`compute(chunk)` for all chunks in order, on all ranks or only on rank 0. Collective, with the errors of
        `collect`."""
        starts = range(self.rank * CHUNK, rows, self.world * CHUNK)
        own = self.all(lambda: {start: compute(range(start, min(start + CHUNK, rows))) for start in starts})
        if self.world == 1:
            return list(own.values())
        shares: list[dict[int, T] | None] = [None] * self.world
        if to_all:
            torch.distributed.all_gather_object(shares, own)
        else:
            torch.distributed.gather_object(own, shares if self.main else None)
        results = {start: part for share in shares for start, part in (share or {}).items()}
        return [results[start] for start in sorted(results)]

    def from_main(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and returns its result on all ranks. Collective, with the errors of `collect`."""
        result = [self.all(lambda: function() if self.main else None)]
        if self.world > 1:
            torch.distributed.broadcast_object_list(result, src=0)
        return cast(T, result[0])

    def all(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank; each rank gets its own result. Collective, with the errors of `collect`."""
        result: T | None = None
        problem: UserError | None = None
        try:
            result = function()
        except UserError as error:
            problem = error
        problems = [problem] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(problems, problem)
        if first := next(filter(None, problems), None):
            first.reported_by_main = not self.main
            raise first
        return cast(T, result)


ALONE = Ranks()
