"""Runs every command of the README, exactly as written and in the same order.

Only budgets are cut: `make demo` trains for seconds, and training commands get `train.total_images` and the like appended.
The commands about Slurm are run by tests/slurm/scenarios.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ranks import ROOT, free_port
from runs import environment

pytestmark = pytest.mark.slow

SHORT = (
    "train.total_images=32 train.global_batch=16 checkpoint.every_images=16 model.generator.channels=[16,16,16] "
    "model.discriminator.channels=[16,16,16] report.every_steps=1 engine.precision=fp32"
).split()


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The project as a user has it, with a folder of pictures."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("dist_t2i", "tools", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy2(ROOT / name, folder / name)
    pictures = folder / "my" / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for i in range(600):  # 2% of them are held out, and scores compare these
        color, shape = ("red", "blue")[i % 2], ("square", "circle")[i // 2 % 2]
        Image.new("RGB", (80, 64 + i % 64), color).save(pictures / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"a {color} {shape}"]}))
    (folder / "my" / "captions.jsonl").write_text("\n".join(lines))
    return folder


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    if "dist_t2i/train.py" in words and "--help-config" not in words:
        words += SHORT
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    if words[0] == "torchrun":
        words[1:1] = ["--master-port", str(free_port())]
    return words


def run(words: list[str], place: Path) -> subprocess.CompletedProcess:
    env = environment(PYTHONPATH=os.pathsep.join([str(place), str(ROOT)]))
    return subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=500)


def test_the_readme_opens_with_the_two_commands():
    assert [command.split()[:2] for command in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]


def test_commands_in_their_order(place):
    """From pictures to an exported model, then on two ranks under each launcher."""
    ran = [command for command in COMMANDS if not command.startswith("make ") and "slurm.local" not in command]
    assert len(ran) >= 8
    for command in ran:
        done = run(shortened(command), place)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (place / "grid.png").exists() and (place / "models" / "mine" / "README.md").exists()
    (script,) = blocks("python")
    done = run([sys.executable, "-c", script], place)
    assert done.returncode == 0, done.stderr
    assert (place / "square.png").exists()


def test_make_demo(place):
    """`make demo` with seconds to train, in this environment instead of a new one."""
    venv = Path(sys.executable).parent.parent
    done = run(["make", "demo", "BUDGET=10s", f"VENV={venv}"], place)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = list((place / "runs").glob("demo*/report/index.html"))
    assert reports and "CC BY-SA 4.0" in reports[0].read_text()
    assert "index.html" in done.stdout
