"""An evaluation over several processes: what each does depends on how many there are, what comes out does not.

Rows are cut into chunks of a fixed size, and whole chunks are dealt out: a network sees the same batches whoever computes
them, so that features are the same to the bit on one rank and on four (with the same number of threads).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dist_t2i.errors import UserError

T = TypeVar("T")
CHUNK = 32
"""Rows of a chunk."""
_PATIENCE = datetime.timedelta(hours=12)
"""How long the others wait for one that is slower, or for rank 0 while it computes the metrics."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world` that evaluate together. By itself unless `join` made it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, rank: int, world: int) -> Ranks:
        """Meet the others under gloo (addresses come from the environment, see launch.py): features travel by the CPU."""
        if world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=_PATIENCE)
        return cls(rank, world)

    def leave(self) -> None:
        """Part with the others, all having come so far."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this one computes the metrics and speaks."""
        return self.rank == 0

    def chunks(self, rows: int) -> Iterator[range]:
        """This rank's share of the chunks of so many rows."""
        for start in range(self.rank * CHUNK, rows, self.world * CHUNK):
            yield range(start, min(start + CHUNK, rows))

    def collect(self, rows: int, compute: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors over all rows on rank 0, from a function that makes them for a chunk (rows first); empty elsewhere.

        Collective. A UserError of any rank is raised on all, to be told by rank 0.
        """
        parts = self.map(rows, compute, to_all=False)
        names = parts[0] if parts else ()
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def map(self, rows: int, compute: Callable[[range], T], *, to_all: bool = True) -> list[T]:
        """`compute(chunk)` of every chunk in order, on all ranks or on rank 0 alone. Collective; errors as in `collect`."""
        mine: dict[int, T] = {}
        problem: UserError | None = None
        try:
            for chunk in self.chunks(rows):
                mine[chunk.start] = compute(chunk)
        except UserError as error:
            problem = error
        self._raise_first(problem)
        if self.world == 1:
            return list(mine.values())
        found: list = [None] * self.world
        if to_all:
            torch.distributed.all_gather_object(found, mine)
        else:
            torch.distributed.gather_object(mine, found if self.main else None)
        everything = {start: part for share in found if share for start, part in share.items()}
        return [everything[start] for start in sorted(everything)]

    def from_main(self, function: Callable[[], T]) -> T:
        """`function()` of rank 0, on all ranks. Collective; errors as in `collect`."""
        said: list = [None]
        problem: UserError | None = None
        if self.main:
            try:
                said[0] = function()
            except UserError as error:
                problem = error
        self._raise_first(problem)
        if self.world > 1:
            torch.distributed.broadcast_object_list(said, src=0)
        return said[0]

    def all(self, function: Callable[[], T]) -> T:
        """`function()` on every rank, each with its own result. Collective; errors as in `collect`."""
        problem: UserError | None = None
        try:
            result = function()
        except UserError as error:
            problem = error
        self._raise_first(problem)
        return result

    def _raise_first(self, problem: UserError | None) -> None:
        problems: list = [problem]
        if self.world > 1:
            problems = [None] * self.world
            torch.distributed.all_gather_object(problems, problem)
        first = next((one for one in problems if one is not None), None)
        if first is not None:
            first.reported_by_main = not self.main
            raise first


ALONE = Ranks()
