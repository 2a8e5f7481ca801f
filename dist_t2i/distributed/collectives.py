"""Collective calls of the ranks outside training steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_t2i.errors import UserError

T = TypeVar("T")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def mean_over_ranks(vector: Tensor) -> Tensor:
    """The mean over the ranks of a float64 CPU vector; every rank gets the same result. Collective."""
    if dist.get_world_size() == 1:
        return vector
    moved = vector.to(_device())
    dist.all_reduce(moved)
    return (moved / dist.get_world_size()).cpu()


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' integers. Collective."""
    if dist.get_world_size() == 1:
        return number
    moved = torch.tensor(number, dtype=torch.int64, device=_device())
    dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    return int(moved)


def on_main(function: Callable[[], T], *, slow: bool = False) -> T:
    """Calls `function()` on rank 0 and returns the result on every rank. Collective.

    If rank 0 raises a UserError, all ranks raise it; ranks other than 0 set `reported_by_main`, so that only rank 0
    prints the error. `slow` runs `function` in a thread, for functions that take longer than a collective's timeout (10
    minutes).
    """
    if slow:
        function = _run_in_thread(function)
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, device=_device())
    result, problem = outcome
    if problem is not None:
        problem.reported_by_main = dist.get_rank() != 0
        raise problem
    return result


def _run_in_thread(function: Callable[[], T]) -> Callable[[], T]:
    """Run `function` in a thread of rank 0. Until `function` ends, all ranks join in a short collective every half
    second, so that no rank times out. The returned function returns the result or raises the error of `function`."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    main, thread = dist.get_rank() == 0, threading.Thread(target=run, daemon=True)
    if main:
        thread.start()
    while max_over_ranks(int(main and thread.is_alive())):
        if main:
            thread.join(0.5)
    return future.result
