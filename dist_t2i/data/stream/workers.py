"""DataLoader workers that a signal does not end, and that do not outlive the run.

Slurm, a terminal's Ctrl-C and a launcher send their signals to the whole process group. Workers ignore them: the
training process decides, saves first, and ends its workers. If it dies without doing so, the kernel kills them.

Workers are forked: two of them deliver their first batch within a second, where spawned ones spend it on imports. A
fork is safe here because a worker touches neither the GPU, nor a process group, nor threads of its parent, and opens
its files itself. Where there is no fork worth having (macOS, Windows), they are spawned.
"""

from __future__ import annotations

import os
import signal
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from dist_t2i.errors import DataError
from dist_t2i.storage.reader_process import allow_clients
from dist_t2i.utils.processes import end_with

_MAX_RESTARTS = 3
_WAITING = 4
"""Batches that a worker may have ready."""
_FORKS = sys.platform == "linux"


@dataclass(frozen=True)
class Failure:
    """What a worker sends in place of a batch: the message of the error that ended it, without its traceback."""

    message: str


class StartWorker:
    """`worker_init_fn`: signals off, one thread, killed with the parent. Picklable."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self, worker: int) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        end_with(self.parent)
        allow_clients()
        torch.set_num_threads(1)


class Lanes:
    """An iterator over the items of several workers in turn, each with a pipe of its own.

    In the DataLoader's usual shared pipe, a worker that is killed in mid-message leaves half of one behind, which its
    parent then waits for without end. Here nobody but the worker holds the pipe's writing end, so its death is an EOF.
    """

    def __init__(self, loaders: list[torch.utils.data.DataLoader], pipeline: Any) -> None:
        self._iterators = []
        self._buffers = []  # held here: what a worker sends is looked for in them
        for lane, loader in enumerate(loaders):
            pipeline.lane = lane, len(loaders)
            pipeline.buffers = pipeline.new_buffers(_WAITING) if _FORKS else None
            self._buffers.append(pipeline.buffers)
            iterator: Any = iter(loader)
            iterator._worker_result_queue._writer.close()  # before the next fork, which would inherit it
            self._iterators.append(iterator)
        self._next = 0

    @property
    def workers(self) -> list[Any]:
        """The worker processes."""
        return [worker for iterator in self._iterators for worker in iterator._workers]

    def __next__(self) -> Any:
        item = next(self._iterators[self._next])
        self._next = (self._next + 1) % len(self._iterators)
        return item

    def end(self) -> None:
        """The loader's own way first; workers that do not follow it are killed: they ignore SIGTERM, and hold nothing."""
        workers = self.workers
        for iterator in self._iterators:
            iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()


class WorkerPool:
    """Reads `pipeline` in `workers` processes, or in this one when 0; a worker that was killed is started anew."""

    def __init__(self, pipeline: Any, workers: int) -> None:
        self._pipeline, self._workers = pipeline, workers
        self._taken = self._restarts = 0
        self._iterator: Any = None
        self._finalizer: weakref.finalize | None = None

    def next(self) -> Any:
        """The next item. Raises DataError for a Failure, or when workers keep dying."""
        while True:
            if self._iterator is None:
                self._start()
            try:
                item = next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:
                # A worker that dies while it hands over a batch breaks a pipe; elsewhere the loader notices.
                if not self._someone_died():
                    raise
                self._restart(error)
                continue
            if isinstance(item, Failure):
                self.close()
                raise DataError(item.message)
            self._taken += 1
            return item

    def close(self) -> None:
        """End the workers. Safe to call twice; also happens when the pool is forgotten, and at exit."""
        self._iterator = None
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    def _start(self) -> None:
        self._pipeline.first = self._taken
        if self._workers == 0:
            self._iterator = iter(self._pipeline)
            return
        loaders = [
            torch.utils.data.DataLoader(
                self._pipeline,
                batch_size=None,
                num_workers=1,
                prefetch_factor=_WAITING,
                worker_init_fn=StartWorker(),
                multiprocessing_context="fork" if _FORKS else "spawn",
            )
            for _ in range(self._workers)
        ]
        before = signal.getsignal(signal.SIGCHLD)
        self._iterator = Lanes(loaders, self._pipeline)
        if signal.getsignal(signal.SIGCHLD) is not before:
            # The loader's handler raises in whatever the main thread is doing, such as saving a checkpoint. Without
            # it `next` notices a dead worker within seconds, which is soon enough.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        self._finalizer = weakref.finalize(self, self._iterator.end)

    def _someone_died(self) -> bool:
        workers = self._iterator.workers if isinstance(self._iterator, Lanes) else ()
        for worker in workers:
            worker.join(timeout=0.1)
        return any(not worker.is_alive() for worker in workers)

    def _restart(self, error: Exception) -> None:
        self.close()
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise DataError(
                f"data loader workers died {self._restarts} times (out of memory? Try a smaller data.workers): {error}"
            ) from error
        print(f"warning: a data loader worker was killed; going on from its last batch ({error})", file=sys.stderr)
