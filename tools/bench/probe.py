"""Measures one loader in a process of its own, as `python -m tools.bench.probe` with a JSON order on its input."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_SECONDS = 600


class ProbeError(RuntimeError):
    """A loader did not do its work; the message ends with what it printed."""


def run(order: dict[str, Any], environment: Mapping[str, str], memory: bool = False) -> dict[str, float]:
    """Start a probe and return what it measured; with `memory`, the peak of its process tree as well.

    Memory is the sum of PSS (each shared page counted once), looked at 20 times a second: in runs of their own, since
    looking takes time from the loader.
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tools.bench.probe"],
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    peak, begun, sent, out, problem = 0, time.monotonic(), False, "", ""
    while True:
        try:
            out, problem = process.communicate(None if sent else json.dumps(order), 0.05 if memory else LIMIT_SECONDS)
            break
        except subprocess.TimeoutExpired:
            sent = True
            peak = max(peak, proportional_bytes(process.pid))
            if time.monotonic() - begun > LIMIT_SECONDS:
                end_tree(process.pid)
                out, problem = process.communicate()
                problem += f"\nended after {LIMIT_SECONDS} s"
                break
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        raise ProbeError(f"{order['loader']}: status {process.returncode}: {(out + problem)[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT ")) | ({"memory": peak} if memory else {})


def proportional_bytes(pid: int) -> int:
    """The sum of PSS of a process and those below it."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


def end_tree(pid: int) -> None:
    """Kill a probe that we started, and what it started."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def cpu_seconds() -> float:
    """What this process and those below it, ended ones included, have used."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(order: dict[str, Any]) -> dict[str, float]:
    """Time to the first batch, then images/s and CPU seconds per 1,000 images over the batches after it."""
    import torch

    from tools.bench import peers

    torch.set_num_threads(1)
    place = peers.Place(**order["place"])
    decode = peers.fast if order["fast"] else None
    preload(order["loader"])
    if decode:
        decode_once(decode)
    started = time.perf_counter()
    batches = peers.LOADERS[order["loader"]](place, decode)
    images, captions = next(batches)
    first = time.perf_counter()
    check(images, captions, order)
    used, count = cpu_seconds(), 0
    for _ in range(order["batches"]):
        images, captions = next(batches)
        count += len(captions)
    seconds = time.perf_counter() - first
    return {
        "first": first - started,
        "rate": count / seconds,
        "cpu": (cpu_seconds() - used) / count * 1000,
    }


def preload(loader: str) -> None:
    """Imports are not what is measured."""
    from tools.bench import peers

    if loader == "mds":
        peers.stand_in_for_torchvision()
    if loader == "dist_t2i":
        import webdataset  # noqa: F401  opening the first stream would import it

        import dist_t2i.data.open_data
        import dist_t2i.data.stream.stream  # noqa: F401
    else:
        importlib.import_module(peers.MODULES[loader])


def decode_once(decode: Any) -> None:
    """So that no loader pays for the decoder's imports in its first batch."""
    from tools.bench.sets import picture

    decode(picture(0))


def check(images: Any, captions: list[str], order: dict[str, Any]) -> None:
    from tools.bench import peers

    shape = (peers.BATCH, 3, peers.SIZE, peers.SIZE)
    if tuple(images.shape) != shape or len(captions) != peers.BATCH or not isinstance(captions[0], str):
        raise ProbeError(f"{order['loader']} gave a batch of {tuple(images.shape)} with {len(captions)} captions")


def decoder_alone(order: dict[str, Any]) -> dict[str, float]:
    """`workers` processes that decode the same bytes from memory, and do nothing else."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    place = order["place"]
    paths = sorted(Path(place["folder"], "pictures").glob("*.jpg"))
    barrier, results = context.Barrier(place["workers"]), context.SimpleQueue()
    processes = [
        context.Process(target=_decode_share, args=(paths[lane :: place["workers"]], order["fast"], barrier, results))
        for lane in range(place["workers"])
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(end for _, _, end, _ in found) - min(start for _, start, _, _ in found)
    count = sum(number for number, _, _, _ in found)
    return {"first": 0.0, "rate": count / seconds, "cpu": sum(used for *_, used in found) / count * 1000}


def _decode_share(paths: list[Path], fast: bool, barrier: Any, results: Any) -> None:
    import torch

    from tools.bench import peers

    torch.set_num_threads(1)
    data, decode = [path.read_bytes() for path in paths], peers.fast if fast else peers.pillow
    decode(data[0])
    barrier.wait()
    start, used = time.perf_counter(), time.process_time()
    batch = []
    for picture in data:
        batch.append(decode(picture))
        if len(batch) == peers.BATCH:
            torch.stack(batch)
            batch = []
    results.put((len(data), start, time.perf_counter(), time.process_time() - used))


def main() -> None:
    order, before = json.load(sys.stdin), shared_memory()
    result = {"decoder": decoder_alone, "start": measure_start}.get(order["loader"], measure)(order)
    print("RESULT " + json.dumps(result), flush=True)
    end(before)


def shared_memory() -> set[Path]:
    """The segments of shared memory that mosaicml-streaming's loaders made on this machine."""
    return set(Path("/dev/shm").glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*"))


def end(before: set[Path]) -> None:
    """At once, and without leaving anything behind for the next one."""
    for child in psutil.Process().children(recursive=True):  # some loaders take seconds to end their workers
        with contextlib.suppress(psutil.Error):
            child.kill()
    for path in shared_memory() - before:  # mosaicml-streaming's
        path.unlink(missing_ok=True)
    os._exit(0)


def measure_start(order: dict[str, Any]) -> dict[str, float]:
    """In a probe: seconds to open the set, to its first batch, and for positions; private bytes of each worker."""
    import numpy
    import psutil

    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.open_data import open_data
    from dist_t2i.data.stream.stream import open_stream, order_of

    data = DataConfig(train=order["folder"], image_size=256, workers=order["workers"], flip=False)
    started = time.perf_counter()
    data_set = open_data(data)
    start = order["start"]
    stream = open_stream(data, data_set.tokenizer, seed=0, global_batch=64, data_set=data_set, start_images=start)
    opened = time.perf_counter()
    next(stream)
    first = time.perf_counter()
    for _ in range(7):
        next(stream)
    children = psutil.Process().children()
    private = [child.memory_full_info().uss for child in children]
    before = time.perf_counter()
    places = order_of(data_set.shards("train"), data, 0)
    places.at(numpy.arange(start, start + 64))
    positioned = time.perf_counter()
    places.at(numpy.arange(start + 64, start + 64 + 64_000))
    return {
        "open": opened - started,
        "first": first - started,
        "position": positioned - before,
        "thousand": (time.perf_counter() - positioned) / 64,
        "private": statistics.mean(private),
        "parent": psutil.Process().memory_full_info().uss,
        "rate": 0.0,
    }


if __name__ == "__main__":
    main()
