"""Real training runs for tests: a small set of pictures, a small configuration, processes as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from prefork import Program, Started
from ranks import ROOT, free_port

TRAIN = ROOT / "dist_t2i" / "train.py"
_TRAINING = Program(
    TRAIN, "torch._dynamo", "deepspeed", "dist_t2i.training.setup", "dist_t2i.data.stream.stream", "tokenizers"
)
"""Imports take most of these runs' processor time; the tests of launching start train.py as it is."""
BATCH = 8

# A wide epsilon keeps AdamW from turning round-off in tiny gradients into whole steps, so that runs of another world size
# can be compared closely. Runs of the same world size are compared to the bit.
CONFIG = """
data: {image_size: 32, workers: 1, max_tokens: 8}
text: {embedding: 16}
model:
  generator: {noise: 8, condition: 8, channels: [16, 12, 8], layout: 256}
  discriminator: {channels: [8, 12, 16], embedding: 16, regions: [8], region_embedding: 8, words: 0}
loss: {penalty_every: 2, g_alignment_text: 1, g_alignment_image: 1, g_alignment_regions: 1, g_mode_seeking: 0, kl: 0.02}
optimizer: {warmup_images: 16, epsilon: 1.0e-3, generator_lr: 8e-4, discriminator_lr: 8e-4, gradient_clipping: 0}
train: {global_batch: 8, total_images: 80}
engine: {precision: fp32}
report: {every_steps: 1, sample_every_images: 1000}
checkpoint: {every_images: 32, keep_last: 20}
"""

# Low learning rates: on some processors, round-off moves an activation across the kink of a leaky ReLU, and a gradient
# jumps. Larger steps would carry this jump into the weights.
RATES = ("optimizer.generator_lr=1e-4", "optimizer.discriminator_lr=1e-4")


def flat(settings: dict, prefix: str = "") -> list[str]:
    """`section.key=value` for every value of a nested mapping."""
    found = []
    for key, value in settings.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]
    return found


def make_set(folder: Path, pictures: int = 48, colors: Sequence[str] = ("red", "green", "blue", "orange")) -> Path:
    """A set of colored shapes with matching captions, written by `tools/shard.py folder`; returns the set's path."""
    images, out = folder / "pictures", folder / "set"
    images.mkdir(parents=True)
    shapes = ["square", "circle", "bar"]
    lines = []
    for i in range(pictures):
        color, shape = colors[i % len(colors)], shapes[i % 3]
        picture = Image.new("RGB", (32, 32), "white")
        draw, x = ImageDraw.Draw(picture), 2 + i % 9
        box = (x, 8, x + 16, 24 if shape != "bar" else 14)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
        picture.save(images / f"{i:03d}.png")
        lines.append(json.dumps({"image": f"{i:03d}.png", "captions": [f"a {color} {shape}", f"{shape}, {color}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "tools" / "shard.py"), "folder", "--images", str(images)]
    command += ["--captions", str(folder / "captions.jsonl"), "--out", str(out), "--shard-samples", "20"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def environment(**more: str) -> dict[str, str]:
    """This process's environment without variables that a launcher may have set."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def whole_lines(file: Path) -> list[dict]:
    """The JSON objects of a file, one per line; an incomplete last line is left out."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def progress(folder: Path) -> dict:
    """The content of the run's progress file, or an empty result before the file exists."""
    try:
        return json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180) -> None:
    """Waits until the condition holds. Fails with the process's output if the process ends first or time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            pytest.fail(f"it never came so far:\n{process.communicate(timeout=300)[0]}")
        time.sleep(0.1)


class Run:
    """A run in `folder` on the set `data`; `start` begins or resumes it, as the training command does for a user."""

    def __init__(self, folder: Path, data: Path, *overrides: str):
        self.folder = folder
        self.config = folder.with_suffix(".yaml")
        self.config.write_text(CONFIG)
        self.overrides = [f"run.folder={folder}", f"data.train={data}", *overrides]

    def command(self, *overrides: str) -> list[str]:
        return [str(TRAIN), "--config", str(self.config), *self.overrides, *overrides]

    def start(self, *overrides: str, ranks: int = 1) -> list[Started]:
        """Starts one process per rank and does not wait. Their output is in the folder's `.out` file."""
        port = str(free_port())
        processes = []
        for rank in range(ranks):
            given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
            env = environment(MASTER_ADDR="127.0.0.1", **given) if ranks > 1 else environment()
            _, *arguments = self.command(*overrides)
            output = self.folder.with_suffix(".out")
            processes.append(_TRAINING.start(*arguments, environment=env, cwd=ROOT, output=output))
        return processes

    def train(self, *overrides: str, ranks: int = 1, timeout: float = 240) -> int:
        """Runs to the end; returns the exit status of rank 0, which the other ranks must share."""
        processes = self.start(*overrides, ranks=ranks)
        try:
            statuses = [p.wait(timeout) for p in processes]
        finally:
            for p in processes:
                p.kill()
                p.wait()
        assert len(set(statuses)) == 1, (statuses, self.output())
        return statuses[0]

    def output(self) -> str:
        return self.folder.with_suffix(".out").read_text(errors="replace")[-5000:]

    def metrics(self) -> list[dict]:
        return whole_lines(self.folder / "metrics.jsonl")

    def losses(self) -> dict[int, dict[str, float]]:
        """Images seen -> losses, logits and gradient norms."""
        kept = ("loss/", "logit/", "grad/", "fake/", "lr")
        return {
            line["images"]: {key: value for key, value in line.items() if key.startswith(kept)}
            for line in self.metrics()
        }

    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "checkpoints").glob("images-*"))

    def tensors(self, images: int) -> dict:
        """Every tensor of the checkpoint at `images`: weights, moments, moving average."""
        folder = self.folder / "checkpoints" / f"images-{images:09d}"
        return {
            f"{file.stem}/{name}": tensor
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }


def assert_same_state(run: Run, other: Run, images: int = 80, tolerance: float = 0.0):
    """Weights, moments and moving average are equal: to the bit, or to `tolerance` of their norm."""
    ours, theirs = run.tensors(images), other.tensors(images)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if tolerance == 0:
            assert torch.equal(ours[name], value), name
        else:
            difference = (ours[name] - value).norm() / value.norm().clamp_min(1.0)
            assert difference <= tolerance, (name, float(difference))


def wait_for_run(condition, process, run: Run, *, allow_exit: bool = False, seconds: float = 120) -> None:
    """Waits until the condition holds; otherwise fails with the run's output. With `allow_exit`, the process may end
    first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            assert allow_exit, run.output()
            return
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.02)
