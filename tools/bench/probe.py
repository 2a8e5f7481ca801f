"""Measures one loader in a separate process, `python -m tools.bench.probe`, which reads a JSON order from stdin."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tools.bench import peers

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 600
_RESULT = "RESULT "


class ProbeError(RuntimeError):
    """A loader failed. The message ends with the output of the loader."""


def run(order: dict[str, Any], environment: Mapping[str, str], memory: bool = False) -> dict[str, float]:
    """Start a probe and return its measurements; with `memory`, also the peak memory of its process tree in bytes.

    Memory is the sum of PSS, which counts each shared page once, sampled 20 times per second. Sampling slows the
    loader, so runs that measure memory are separate from runs that measure time. Raises ProbeError.
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
    peak, started = 0, time.monotonic()
    text: str | None = json.dumps(order)
    while True:
        try:
            output, errors = process.communicate(text, 0.05 if memory else LIMIT_SECONDS)
            break
        except subprocess.TimeoutExpired:
            text = None  # the first call of `communicate` has already sent the order
            peak = max(peak, proportional_bytes(process.pid))
            if time.monotonic() - started > LIMIT_SECONDS:
                kill(process_tree(process.pid))
    results = [line for line in output.splitlines() if line.startswith(_RESULT)]
    if process.returncode or not results:
        status = f"status {process.returncode} after {time.monotonic() - started:.0f} s"
        raise ProbeError(f"{order['loader']}: {status}: {(output + errors)[-2000:]}")
    return json.loads(results[-1].removeprefix(_RESULT)) | ({"memory": peak} if memory else {})


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty when the process has ended."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def proportional_bytes(pid: int) -> int:
    """Sum of the PSS of a process and its descendants."""
    total = 0
    for process in process_tree(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def cpu_seconds() -> float:
    """User and system seconds of this process, its descendants, and its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    for child in process_tree(os.getpid())[1:]:
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


# ---- in the probe ----------------------------------------------------------------------------------------------------


def measure_loader(order: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first batch, then images/s and CPU seconds per 1,000 images over the following batches."""
    import torch

    from tools.bench.sets import picture

    torch.set_num_threads(1)
    decode = peers.fast if order["fast"] else None
    peers.preload(order["loader"])
    if decode:
        decode(picture(0))  # imports the decoder, so that the first batch does not include this import
    started = time.perf_counter()
    batches = peers.LOADERS[order["loader"]].batches(peers.Location(**order["location"]), decode)
    images, captions = next(batches)
    first = time.perf_counter()
    shape = (peers.BATCH, 3, peers.SIZE, peers.SIZE)
    if tuple(images.shape) != shape or len(captions) != peers.BATCH or not isinstance(captions[0], str):
        raise ProbeError(f"{order['loader']} returned a batch of {tuple(images.shape)} with {len(captions)} captions")
    used, count = cpu_seconds(), 0
    for _ in range(order["batches"]):
        images, captions = next(batches)
        count += len(captions)
    seconds = time.perf_counter() - first
    return {"first": first - started, "rate": count / seconds, "cpu": (cpu_seconds() - used) / count * 1000}


def measure_decoder(order: dict[str, Any]) -> dict[str, float]:
    """Images/s and CPU seconds per 1,000 images, for `workers` processes that only decode pictures from memory."""
    import torch

    torch.set_num_threads(1)
    workers, decode = order["location"]["workers"], peers.fast if order["fast"] else peers.pillow
    pictures = [path.read_bytes() for path in Path(order["location"]["folder"], "pictures").glob("*.jpg")]
    decode(pictures[0])
    results = multiprocessing.get_context("fork").SimpleQueue()

    def decode_share(rank: int) -> None:
        start, used = time.perf_counter(), time.process_time()
        share = pictures[rank::workers]
        for first in range(0, len(share), peers.BATCH):
            torch.stack([decode(picture) for picture in share[first : first + peers.BATCH]])
        results.put((start, time.perf_counter(), time.process_time() - used))

    processes = [multiprocessing.get_context("fork").Process(target=decode_share, args=(i,)) for i in range(workers)]
    for process in processes:
        process.start()
    starts, ends, used = zip(*(results.get() for _ in processes), strict=True)
    rate = len(pictures) / (max(ends) - min(starts))
    return {"first": 0.0, "rate": rate, "cpu": sum(used) / len(pictures) * 1000}


def measure_start(order: dict[str, Any]) -> dict[str, float]:
    """Seconds to open a set, to get the first batch, and to compute positions; private bytes of workers and parent."""
    import numpy

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
    private = [child.memory_full_info().uss for child in psutil.Process().children()]
    before = time.perf_counter()
    positions = order_of(data_set.shards("train"), data, 0)
    positions.at(numpy.arange(start, start + 64))
    positioned = time.perf_counter()
    positions.at(numpy.arange(start + 64, start + 64 + 64_000))
    return {
        "open": opened - started,
        "first": first - started,
        "position": positioned - before,
        "thousand": (time.perf_counter() - positioned) / 64,
        "private": statistics.mean(private),
        "parent": psutil.Process().memory_full_info().uss,
        "rate": 0.0,
    }


def shared_memory() -> set[Path]:
    """The shared-memory segments of mosaicml-streaming on this machine."""
    return set(Path("/dev/shm").glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*"))


def main() -> None:
    order, segments = json.load(sys.stdin), shared_memory()
    measure = {"decoder": measure_decoder, "start": measure_start}.get(order["loader"], measure_loader)
    print(_RESULT + json.dumps(measure(order)), flush=True)
    kill(process_tree(os.getpid())[1:])  # some loaders take seconds to end their workers
    for path in shared_memory() - segments:
        path.unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    main()
