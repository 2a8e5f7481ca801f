"""DataLoader workers that ignore signals and end with the training process.

Slurm, launchers and Ctrl-C in a terminal send signals to the whole process group. Workers ignore these signals, so that
the training process can save before it ends its workers. The kernel kills the workers of a dead training process.

Workers are forked, because spawned workers need a second for imports alone, while two forked workers deliver their
first batch within a second. The fork is safe because a worker does not use its parent's GPU, process group or threads,
and opens its files anew. Outside Linux, workers are spawned. This module uses private parts of the DataLoader, which
are listed in tests/data/test_library_internals.py.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dist_t2i.errors import DataError
from dist_t2i.storage.reader_process import allow_clients
from dist_t2i.utils.processes import end_with, ignore_stop_signals

_MAX_RESTARTS = 3
_PREFETCH = 4
"""The number of finished batches that may wait in each worker."""
_FORKS = sys.platform == "linux"

DatasetOfWorker = Callable[[int, int, int], torch.utils.data.IterableDataset]
"""(first, step, waiting) -> an iterable dataset over every `step`-th item, beginning with item `first`. `waiting` is
the largest number of finished items that wait for the parent."""


def _start_worker(parent: int, worker: int) -> None:
    ignore_stop_signals()
    end_with(parent)
    allow_clients()
    torch.set_num_threads(1)


class Lanes(Iterator[Any]):
    """Iterates over the items of several workers in turn; each worker has its own pipe.

    Usually all workers of a DataLoader share one pipe. A worker that is killed while it writes leaves half a message in
    the pipe, and the parent waits for the rest forever. In this class, only the worker holds the writing end of its
    pipe, so the parent reads an end of file when the worker dies."""

    def __init__(self, dataset_of: DatasetOfWorker, first: int, workers: int) -> None:
        self._iterators: list[Any] = []
        self._datasets: list[Any] = []  # kept, because batches refer to the shared buffers in these datasets
        for worker in range(workers):
            dataset = dataset_of(first + worker, workers, _PREFETCH if _FORKS else 0)
            loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
                dataset,
                batch_size=None,
                num_workers=1,
                prefetch_factor=_PREFETCH,
                worker_init_fn=functools.partial(_start_worker, os.getpid()),
                multiprocessing_context="fork" if _FORKS else "spawn",
            )
            iterator: Any = iter(loader)
            iterator._worker_result_queue._writer.close()  # the next worker must not inherit the writing end
            self._iterators.append(iterator)
            self._datasets.append(dataset)
        self._turns = itertools.cycle(self._iterators)

    @property
    def workers(self) -> list[Any]:
        """The worker processes."""
        return [worker for iterator in self._iterators for worker in iterator._workers]

    def __next__(self) -> Any:
        return next(next(self._turns))

    def end(self) -> None:
        """Ends the workers as the DataLoader does, then kills workers that still run; workers hold no state."""
        workers = self.workers
        for iterator in self._iterators:
            iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()


class WorkerPool:
    """The items of a dataset, computed in `workers` processes (0: in this process). Restarts workers that were
    killed."""

    def __init__(self, dataset_of: DatasetOfWorker, workers: int) -> None:
        self._dataset_of, self._workers = dataset_of, workers
        self._taken = self._restarts = 0
        self._iterator: Iterator[Any] | None = None
        self._finalizer: weakref.finalize | None = None

    def next(self) -> Any:
        """The next item. Raises DataError if the item is a DataError or workers keep dying."""
        while True:
            iterator = self._iterator or self._start()
            try:
                item = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:
                # If a worker dies while sending a batch, its pipe breaks. The DataLoader notices a death at another
                # time. In both cases, `next` raises one of these errors, but the errors can have other causes.
                if not _worker_died(iterator):
                    raise
                self._restart(error)
                continue
            if isinstance(item, DataError):
                self.close()
                raise item
            self._taken += 1
            return item

    def close(self) -> None:
        """Ends the workers. May be called twice. Garbage collection of the pool and process exit call it, too."""
        self._iterator = None
        if self._finalizer is not None:
            self._finalizer()  # a second call does nothing

    def _start(self) -> Iterator[Any]:
        if self._workers == 0:
            self._iterator = iter(self._dataset_of(self._taken, 1, 0))
            return self._iterator
        before = signal.getsignal(signal.SIGCHLD)
        self._iterator = lanes = Lanes(self._dataset_of, self._taken, self._workers)
        if signal.getsignal(signal.SIGCHLD) is not before:
            # Remove the DataLoader's signal handler, because this handler could raise anywhere in the main thread, for
            # example while a checkpoint is saved. `next` notices a dead worker without the handler.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        self._finalizer = weakref.finalize(self, lanes.end)
        return lanes

    def _restart(self, error: Exception) -> None:
        self.close()
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise DataError(
                f"data loader workers died {self._restarts} times (out of memory? Try a smaller data.workers): {error}"
            ) from error
        print(f"warning: a data loader worker was killed; continuing after its last batch ({error})", file=sys.stderr)


def _worker_died(iterator: Iterator[Any]) -> bool:
    workers = iterator.workers if isinstance(iterator, Lanes) else []
    for worker in workers:
        worker.join(timeout=0.1)
    return any(not worker.is_alive() for worker in workers)
