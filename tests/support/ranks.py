"""Runs a function of a test module on several gloo ranks; each rank is a separate process."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from dist_t2i.distributed.launch import free_ports

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    return free_ports(1)[0]


def run_ranks(world_size: int, function, *args, timeout: float = 300):
    """`function(*args)` on every rank of a new process group; returns the list of results by rank.

    `function` must be importable (module level). Fails with the ranks' output when any of them fails.
    """
    own = str(Path(inspect.getfile(function)).parent)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "args").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        port = free_port()
        processes = []
        for rank in range(world_size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), str(ROOT / "tests" / "support"), own, os.environ.get("PYTHONPATH", "")]
                ),
            }
            command = [sys.executable, "-W", "ignore", __file__, folder]
            processes.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = []
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        finally:
            for p in processes:
                p.kill()
        if any(p.returncode for p in processes):
            raise AssertionError("\n".join(f"--- rank {r}\n{out[-6000:]}" for r, out in enumerate(outputs)))
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _main() -> None:
    folder = Path(sys.argv[1])
    module, name, args = pickle.loads((folder / "args").read_bytes())
    import torch

    torch.set_num_threads(1)
    result = getattr(importlib.import_module(module), name)(*args)
    (folder / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():  # gloo's threads may still run when the interpreter ends, and can abort it
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
