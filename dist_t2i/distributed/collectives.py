"""What the ranks of a run say to each other outside of training steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_t2i.errors import UserError

T = TypeVar("T")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def mean_over_ranks(vector: Tensor) -> Tensor:
    """A float64 CPU vector, averaged over the ranks; the same on all of them. Collective."""
    if dist.get_world_size() == 1:
        return vector
    moved = vector.to(_device())
    dist.all_reduce(moved)
    return (moved / dist.get_world_size()).cpu()


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' whole numbers. Collective."""
    if dist.get_world_size() == 1:
        return number
    moved = torch.tensor(number, dtype=torch.int64, device=_device())
    dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    return int(moved)


def on_main(function: Callable[[], T], *, slow: bool = False) -> T:
    """`function()` on rank 0, its result on every rank. Collective.

    A UserError of rank 0 is raised on all ranks, with `reported_by_main` set on the others, so that it is shown once. `slow`
    runs it in a thread, for what may take longer than the others wait in a collective (10 minutes).
    """
    if slow:
        function = _waited_for(function)
    said: list = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = function()
        except UserError as error:
            said[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(said, src=0, device=_device())
    result, problem = said
    if problem is not None:
        problem.reported_by_main = dist.get_rank() != 0
        raise problem
    return result


def _waited_for(function: Callable[[], T]) -> Callable[[], T]:
    """Runs `function` on rank 0 while all ranks meet every now and then; returns what then gives its result."""
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            result = function()
            outcome.append(lambda: result)
        except BaseException as error:
            failure = error

            def fail() -> T:
                raise failure

            outcome.append(fail)

    thread = threading.Thread(target=run, daemon=True) if dist.get_rank() == 0 else None
    if thread is not None:
        thread.start()
    going_on = 1
    while going_on:
        if thread is not None:
            thread.join(0.5)
        going_on = max_over_ranks(int(thread is not None and thread.is_alive()))
    return lambda: outcome[0]()
