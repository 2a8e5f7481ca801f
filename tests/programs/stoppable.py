"""A training run reduced to its stopping: steps, a loader worker, an agreed stop, a save.

usage: stoppable.py FOLDER SAVE_SECONDS. Every rank writes FOLDER/pid-RANK at its start and FOLDER/saved-RANK when it saves
(the reason and the step).
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_t2i.launch import prepare
from dist_t2i.preempt import STOPPED, StopFlag, ignore_stop_signals, signals_blocked


def work(ready: Path) -> None:
    ignore_stop_signals()
    ready.write_text(str(os.getpid()))
    time.sleep(600)


def main() -> int:
    rank = prepare()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    folder, save_seconds = Path(arguments[0]), float(arguments[1])
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def all_reduce_max(number: int) -> int:
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    with StopFlag(announce=rank.rank == 0) as stop:
        with signals_blocked():
            worker = multiprocessing.get_context("fork").Process(
                target=work, args=(folder / f"worker-{rank.rank}",), daemon=True
            )
            worker.start()
        while not (folder / f"worker-{rank.rank}").exists():
            time.sleep(0.01)
        (folder / f"pid-{rank.rank}").write_text(str(os.getpid()))
        step = 0
        while not (why := stop.agreed(all_reduce_max)):
            time.sleep(0.05)
            step += 1
        time.sleep(save_seconds)
        alive = "worker alive" if worker.is_alive() else f"worker ended with {worker.exitcode}"
        (folder / f"saved-{rank.rank}").write_text(f"{why} step {step} {alive}")
        dist.barrier()
    worker.kill()
    dist.destroy_process_group()
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
