"""The demo as a new user runs it, at a size that takes seconds: interrupted, resumed, finished, shown again."""

import argparse
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_t2i.config import files as config_files
from models_on_disk import write_tone_set
from ranks import ROOT
from runs import progress, wait_for

TOOL = ROOT / "tools" / "demo.py"
CONFIG = """
data: {image_size: 32, max_tokens: 12, workers: 0}
text: {embedding: 16}
model:
  generator: {noise: 8, condition: 8, channels: [16, 8]}
  discriminator: {channels: [8, 16], embedding: 16}
train: {global_batch: 8}
"""


@pytest.fixture(scope="module")
def demo():
    return vars(importlib.import_module("dist_t2i.cli.demo"))


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("3m", 180), ("10m", 600), ("1h", 3600), ("1.5m", 90), ("7", 7)]
)
def test_times(demo, text, value):
    assert demo["seconds"](text) == value
    assert demo["seconds"](demo["spelled"](value)) == value


@pytest.mark.parametrize("text", ["", "soon", "0s", "-3m", "3 days"])
def test_what_is_no_duration(demo, text):
    with pytest.raises(argparse.ArgumentTypeError, match="write 90s"):
        demo["seconds"](text)


@pytest.mark.parametrize(("rate", "budget", "batch"), [(138.2, 600, 32), (3.0, 5, 64), (5000.0, 3600, 64)])
def test_a_plan_is_a_run_that_the_configuration_accepts(demo, rate, budget, batch):
    settings = demo["budget_overrides"](rate, budget, batch)
    planned = config_files.loads("", [*settings, f"train.global_batch={batch}"])
    total = planned.train.total_images
    assert total % batch == 0 and (0.9 * rate * budget < total <= rate * budget or total == 8 * batch)
    assert planned.report.sample_every_images % batch == planned.checkpoint.every_images % batch == 0


@pytest.mark.parametrize(("name", "parts"), [("openmoji32", ("pixels 300", "colors 16")), ("scenes32", ())])
def test_it_names_what_is_for_drawings_only(demo, name, parts):
    found = demo["for_drawings"](config_files.load(ROOT / "configs" / f"{name}.yaml"))
    assert all(any(text.endswith(part) for text in found) for part in parts) and bool(found) == bool(parts)


@pytest.mark.slow
def test_interrupted_resumed_finished_and_shown_again(tmp_path):
    """Signals are sent only to the demo process, as by `kill`; the training must save nevertheless."""
    pytest.importorskip("efficientnet_lite_pytorch")
    data, run = write_tone_set(tmp_path / "set", roles=8), tmp_path / "runs" / "demo"
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    command = [sys.executable, TOOL, "--budget", "8s", "--config", tmp_path / "tiny.yaml", "--run", run, "--data", data]

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    early = start()
    wait_for(lambda: processes(tmp_path) > 1, early)
    early.send_signal(signal.SIGTERM)
    output, _ = early.communicate(timeout=300)
    assert early.returncode == 130 and "the same command" in output, output
    assert not run.exists() and processes(tmp_path) == 0

    first = start()
    wait_for(lambda: progress(run).get("images", 0) > 0, first)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 130 and "the same command resumes" in output, output
    stopped = progress(run)
    assert stopped["state"] == "stopped" and stopped["checkpoint"]
    assert not list(run.parent.glob(".demo-speed*")) and processes(tmp_path) == 0

    total = stopped["total_images"]
    second = start()
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert "Training resumes in" in output and "KID (EfficientNet-Lite0)" in output and "floor" in output
    assert progress(run)["state"] == "finished" and progress(run)["images"] == total
    page = (run / "report" / "index.html").read_text()
    for part in ("role number", "Samples during training", "Curves", "KID (EfficientNet-Lite0)", "make demo"):
        assert part in page
    assert 'src="http' not in page and str(Path.home()) not in page

    scores, written = (run / "scores.json").read_bytes(), (run / "report" / "index.html").stat().st_mtime_ns
    third = start()
    output, _ = third.communicate(timeout=300)
    assert third.returncode == 0 and "has finished already" in output, output
    assert (run / "scores.json").read_bytes() == scores
    assert (run / "report" / "index.html").stat().st_mtime_ns > written


def processes(folder):
    """The number of processes with this folder on their command line."""
    lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return sum(any(str(folder) in part for part in line) for line in lines)
