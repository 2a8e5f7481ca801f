"""A minimal training run for tests of stopping: steps, a loader worker, an agreed stop, a save.

usage: stoppable.py FOLDER SAVE_SECONDS [hang]. Every rank writes FOLDER/pid-RANK once it runs, and FOLDER/saved-RANK when
it saves (why, how its worker is, and who it is). With `hang` the main thread then blocks in C, where no Python handler runs.
"""

import ctypes
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dist_t2i.distributed.launch import prepare
from dist_t2i.distributed.preemption import StopFlag
from dist_t2i.errors import ExitStatus
from dist_t2i.utils.processes import ignore_stop_signals, signals_blocked


def work(ready: Path) -> None:
    ignore_stop_signals()
    ready.write_text(str(os.getpid()))
    time.sleep(600)


def start_worker(ready: Path) -> multiprocessing.Process:
    with signals_blocked():
        worker = multiprocessing.get_context("fork").Process(target=work, args=(ready,), daemon=True)
        worker.start()
    while not ready.exists():
        time.sleep(0.01)
    return worker


class Ranks:
    """The MAX over the ranks, through files: importing torch would take longer than the whole test."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size, self.round = folder, rank, world_size, 0

    def max(self, number: int) -> int:
        self.round += 1
        files = [self.folder / f"round-{self.round}-{rank}" for rank in range(self.world_size)]
        aside = self.folder / f"writing-{self.rank}"
        aside.write_text(str(number))
        aside.rename(files[self.rank])
        while not all(file.exists() for file in files):
            time.sleep(0.002)
        return max(int(file.read_text()) for file in files)


def hang() -> None:
    """Locks a mutex twice, which no signal interrupts."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def main() -> int:
    rank = prepare()
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder, save_seconds = Path(arguments[0]), float(arguments[1])
    ranks = Ranks(folder, rank.rank, rank.world_size)
    stop = StopFlag(announce=rank.rank == 0).install()
    worker = start_worker(folder / f"worker-{rank.rank}")
    (folder / f"pid-{rank.rank}").write_text(str(os.getpid()))
    if "hang" in arguments:
        hang()
    while not (why := stop.agreed(ranks.max)):
        time.sleep(0.05)
    time.sleep(save_seconds)
    state = "alive" if worker.is_alive() else f"ended with {worker.exitcode}"
    (folder / f"saved-{rank.rank}").write_text(
        f"{why.text}, worker {state}, rank {rank.rank} of {rank.world_size} under {rank.launcher}"
    )
    ranks.max(0)
    worker.kill()
    return ExitStatus.STOPPED


if __name__ == "__main__":
    sys.exit(main())
