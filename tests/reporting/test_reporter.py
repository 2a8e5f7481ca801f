"""Reports of a run: lines, files, pictures, W&B. Terminals are real pseudo-terminals."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dist_t2i.config.fields import flatten
from dist_t2i.config.files import loads
from dist_t2i.reporting import metrics_log
from dist_t2i.reporting.console import Console, format_line
from dist_t2i.reporting.curves import plot_curves, smooth
from dist_t2i.reporting.image_grid import GridRow, render_grid, wrap
from dist_t2i.reporting.meter import Meter
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.reporting.wandb_logger import SETTINGS
from dist_t2i.utils.progress import duration
from ranks import ROOT

VALUES = {
    "images_per_second": 138.4,
    "data_wait": 0.034,
    "loss/d": 1.433,
    "loss/g": 0.5181,
    "logit/real": 0.812,
    "logit/fake": -0.77,
    "grad/discriminator": 3.42,
    "grad/generator": 1.21,
    "memory_bytes": 1.23e9,
}


# ---- the line --------------------------------------------------------------------------------------------------------


def test_the_line_has_everything_one_wants_to_see():
    assert format_line(123_456, 1_000_000, VALUES) == (
        " 12.3%  123,456 images  eta 1:45:33  138/s  data 3%  D 1.43 G 0.52  real +0.81 fake -0.77"
        "  |grad| D 3.4 G 1.2  1.2 GB"
    )


@pytest.mark.parametrize("width", [200, 119, 100, 80, 60, 40, 20, 5])
def test_the_line_fits_any_terminal(width: int):
    line = format_line(123_456, 1_000_000, VALUES, width)
    assert len(line) <= width
    assert line.isascii()
    if width >= 40:
        assert "12.3%" in line and "eta 1:45:33" in line
    if width >= 80:
        assert "-0.77" in line


def test_the_first_line_needs_no_rate_and_odd_numbers_do_not_break_it():
    assert format_line(0, 100, {}) == "  0.0%  0 images"
    assert "nan" in format_line(50, 100, {"loss/d": math.nan})
    assert "eta 0:00" in format_line(120, 100, {"images_per_second": 1.0})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3723, "1:02:03"),
        (273_600, "3d 04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


class Terminal:
    """A pseudo-terminal with `columns` columns; `text` reads what was written to `stream`."""

    def __init__(self, columns: int):
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 4096):
                self._parts.append(part)
        except OSError:  # the error of a closed terminal
            pass

    def text(self) -> str:
        self.stream.close()
        self._reader.join(5)
        os.close(self._master)
        return b"".join(self._parts).decode()


def test_on_a_terminal_one_line_is_rewritten_beneath_the_messages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(columns=70)
    console = Console(terminal.stream)
    for images in range(0, 500, 100):
        console.line(images, 1000, VALUES, now=True)
    console.say("a message")
    console.line(500, 1000, VALUES, now=True)
    console.close()
    text = terminal.text()
    assert text.count("\n") == 2  # after the message, and at the end
    shown = re.split(r"[\r\n]+", text.replace("\x1b[K", ""))
    assert all(len(line) < 70 for line in shown)
    assert shown[-2].strip().startswith("50.0%")
    assert "a message" in shown


def test_elsewhere_there_are_few_whole_lines():
    stream = io.StringIO()
    console = Console(stream)
    for images in range(1000):
        console.line(images, 1000, VALUES)
    console.say("a message")
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert lines[1] == "a message"


def test_a_terminal_that_is_gone_does_not_end_a_run():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        console = Console(stream)
        console.line(1, 2, VALUES, now=True)
        console.say("nobody reads this")
        with pytest.raises(BrokenPipeError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


# ---- averages --------------------------------------------------------------------------------------------------------


def test_metrics_are_averaged_over_the_steps_that_have_them():
    meter = Meter()
    assert meter.take() == {}
    for step in range(4):
        meter.add(
            8,
            {"loss/d": torch.tensor(float(step), requires_grad=True), **({"loss/d_penalty": 3.0} if step == 0 else {})},
        )
    values = meter.take()
    assert values["loss/d"] == 1.5
    assert values["loss/d_penalty"] == 3.0
    assert meter.take() == {}


def test_times_are_separated():
    meter = Meter()
    with meter.waiting():
        time.sleep(0.06)
    with meter.paused():
        time.sleep(0.5)
    time.sleep(0.06)
    meter.add(12, {})
    values = meter.take()
    assert values["data_wait"] == pytest.approx(0.5, abs=0.2)
    assert values["seconds_per_step"] == pytest.approx(0.12, abs=0.08)
    assert values["images_per_second"] == pytest.approx(12 / values["seconds_per_step"])


def test_ranks_share_their_averages_and_nan_is_kept():
    meter = Meter()
    meter.add(8, {"loss/d": 2.0, "loss/g": math.nan})
    values = meter.take(lambda vector: (vector + torch.tensor([6.0, 0.0, 0.0, 0.0], dtype=torch.float64)) / 2)
    assert values["loss/d"] == 4.0  # the other rank had 6
    assert math.isnan(values["loss/g"])


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_metrics_are_one_object_a_line_whatever_the_numbers(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    metrics_log.append(file, {"images": 64, "loss/d": math.nan, "loss/g": -math.inf, "x": 1.5})
    line = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert line == {"images": 64, "loss/d": "NaN", "loss/g": "-Infinity", "x": 1.5}


def test_on_resume_no_line_is_double(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    for images in range(100, 600, 100):
        metrics_log.append(file, {"images": images})
    file.write_text(file.read_text() + '{"images": 600, "los')  # cut by a kill -9
    assert [entry["images"] for entry in metrics_log.read(file)] == [100, 200, 300, 400, 500]
    assert metrics_log.cut(file, 300) == 2
    metrics_log.append(file, {"images": 400})
    assert [json.loads(line)["images"] for line in file.read_text().splitlines()] == [100, 200, 300, 400]
    assert metrics_log.cut(tmp_path / "none.jsonl", 10) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture(seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_a_grid_shows_every_picture_whole_and_the_real_one_first():
    rows = [GridRow(f"caption {n}", [picture(10 * n), picture(10 * n + 1)], picture(10 * n + 2)) for n in range(3)]
    grid = np.asarray(render_grid(rows, title="a run", tile=64))
    for n, row in enumerate(rows):
        top = grid.shape[0] - (3 - n) * 70
        for column, expected in enumerate(row.generated):
            left = grid.shape[1] - (2 - column) * 70 - 6
            tile = grid[top : top + 64, left : left + 64]
            assert np.array_equal(tile[::2, ::2], expected)
    text = grid[:, :230]
    assert (text < 128).any(), "captions are rendered"


def test_grids_of_many_rows_of_other_sizes_and_of_nothing():
    many = render_grid([GridRow("x", [picture(n, 256)]) for n in range(11)])
    assert many.width > many.height / 4
    assert render_grid([]).size[0] > 0
    render_grid([GridRow("", [Image.new("L", (32, 32))], None), GridRow("b", [])])


@pytest.mark.parametrize(
    "text", ["", "word", "a red bird with a long tail " * 20, "x" * 500, "鳥 🐦 птица " * 9, " \n\t "]
)
def test_captions_are_wrapped_to_their_place(text: str):
    font = ImageFont.load_default(14)
    lines = wrap(text, 200, 4, font).splitlines()
    assert len(lines) <= 4
    assert all(font.getlength(line) <= 215 for line in lines)
    if len(text) > 300:
        assert lines[-1].endswith("...")
    else:
        assert "".join("".join(lines).split()) in "".join(text.split()) + "..."


def test_curves_are_plotted_from_the_metrics(tmp_path: Path):
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    assert not plot_curves(metrics, out)
    for n in range(100):
        metrics_log.append(metrics, {"images": n * 64, **VALUES, "loss/d": 2 / (n + 1) if n != 50 else math.nan})
    assert plot_curves(metrics, out, title="a run")
    image = Image.open(out)
    assert image.width >= 1000
    assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 20
    assert not list(tmp_path.glob(".*"))


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([5.0] * 200) == pytest.approx([5.0] * 200)
    assert smooth([1.0, 3.0])[0] == 1.0


# ---- the reporter ----------------------------------------------------------------------------------------------------


def make_reporter(folder: Path, *overrides: str, main: bool = True, stream: io.StringIO | None = None) -> Reporter:
    config = loads("train: {total_images: 1000}", overrides)
    return Reporter(
        folder,
        config.report,
        total_images=config.train.total_images,
        title="a run",
        wandb_config=flatten(config),
        main=main,
        stream=stream or io.StringIO(),
    )


def report_run(folder: Path, begin: int, end: int, *overrides: str, state: str = "stopped") -> Reporter:
    reporter = make_reporter(folder, *overrides)
    reporter.start(begin)
    for images in range(begin + 100, end + 1, 100):
        reporter.metrics(images, images // 10, {"loss/d": 1.0, "images_per_second": 50.0})
        reporter.tick(images)
    reporter.close(state, "the end")
    return reporter


def test_a_run_folder_after_a_stop_and_a_resume(tmp_path: Path):
    run = tmp_path / "run"
    first = report_run(run, 0, 500)
    assert (
        first.samples(500, [GridRow("a cat", [picture(1)])], name="images-000000500")
        == run / "samples" / "images-000000500.png"
    )
    report_run(run, 300, 1000, state="finished")
    images = [entry["images"] for entry in metrics_log.read(run / "metrics.jsonl")]
    assert images == list(range(100, 1001, 100))
    progress = json.loads((run / "progress.json").read_text())
    assert progress["state"] == "finished"
    assert (progress["images"], progress["total_images"], progress["pid"]) == (1000, 1000, os.getpid())
    assert progress["eta_seconds"] == 0
    log = (run / "log.txt").read_text()
    assert "dropped 2 reports after the checkpoint" in log
    assert log.count("the end") == 2
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", log)
    assert (run / "curves.png").stat().st_size > 1000


def test_scores_are_lines_of_their_own_and_panels_of_the_curves(tmp_path: Path):
    reporter = report_run(tmp_path, 0, 100)
    without = Image.open(tmp_path / "curves.png").height
    scores = {"eval/test/kid": 0.5, "eval/test/recall_at_1": 0.25, "eval/test/tone_order": 1.0}
    for images in (200, 300):
        reporter.evaluated(images, images // 10, scores, best=images == 200)
    entries = metrics_log.read(tmp_path / "metrics.jsonl")
    assert [entry["images"] for entry in entries] == [100, 200, 300]
    assert entries[1].keys() == {"images", "step", "time", *scores} and "loss/d" not in entries[1]
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").height > without
    log = (tmp_path / "log.txt").read_text()
    assert log.count("evaluated at") == 2 and log.count("test/kid 0.500") == 2 and log.count("the best so far") == 1


def test_progress_json_has_the_position(tmp_path: Path):
    reporter = make_reporter(tmp_path)
    reporter.start(0)
    reporter.metrics(250, 25, {"images_per_second": 50.0})
    reporter.saved(250, tmp_path / "checkpoints" / "images-000000250")
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["state"] == "training"
    assert (progress["images"], progress["images_per_second"], progress["eta_seconds"]) == (250, 50.0, 15.0)
    assert progress["checkpoint"].endswith("images-000000250")


def test_other_ranks_write_nothing_but_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    stream = io.StringIO()
    reporter = make_reporter(tmp_path / "run", main=False, stream=stream)
    reporter.start(0)
    reporter.metrics(64, 1, VALUES)
    reporter.tick(64)
    reporter.say("for rank 0 to say")
    assert reporter.samples(64, [GridRow("a cat", [picture(1)])], name="images-000000064") is None
    reporter.saved(64, tmp_path)
    reporter.warn("a slow disk")
    reporter.close("finished", "the end")
    assert stream.getvalue() == "rank 3: warning: a slow disk\n"
    assert not (tmp_path / "run").exists()


def test_a_full_disk_causes_one_warning_and_training_continues(tmp_path: Path):
    stream = io.StringIO()
    reporter = make_reporter(tmp_path, stream=stream)
    reporter.start(0)
    for name in ("metrics.jsonl", "log.txt", "samples"):
        (tmp_path / name).symlink_to("/dev/full")
    for images in range(100, 600, 100):
        reporter.metrics(images, images // 10, {"loss/d": 1.0, "images_per_second": 50.0})
    (tmp_path / "metrics.jsonl").unlink()  # reading /dev/full never ends
    assert reporter.samples(500, [GridRow("a cat", [picture(1)])], name="images-000000500") is None
    reporter.metrics(600, 60, {"loss/d": 1.0, "images_per_second": 50.0})
    assert [entry["images"] for entry in metrics_log.read(tmp_path / "metrics.jsonl")] == [600]
    warnings = [line for line in stream.getvalue().splitlines() if "warning" in line]
    assert len(warnings) == len(set(warnings)) <= 4
    assert any("No space left on device; training continues" in line for line in warnings)


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wandb_offline_keeps_one_id_across_resumes(tmp_path: Path):
    run = tmp_path / "run"
    report_run(run, 0, 300, "report.wandb=offline")
    identity = (run / "wandb_id.txt").read_text().strip()
    report_run(run, 300, 500, "report.wandb=offline")
    assert (run / "wandb_id.txt").read_text().strip() == identity
    files = list((run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_does_not_stop_the_run(tmp_path: Path):
    """Online, with a key, and with a port at which no server listens."""
    code = (
        "import sys; sys.path[:0] = [{root!r}, {support!r}, {tests!r}]\n"
        "from pathlib import Path; from test_reporter import report_run\n"
        "report_run(Path({run!r}), 0, 1000, 'report.wandb=online', state='finished')\n"
    ).format(
        root=str(ROOT),
        support=str(ROOT / "tests" / "support"),
        tests=str(Path(__file__).parent),
        run=str(tmp_path / "run"),
    )
    env = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["state"] == "finished"
    assert len(metrics_log.read(tmp_path / "run" / "metrics.jsonl")) == 10
    assert "W&B cannot be used" in (tmp_path / "run" / "log.txt").read_text()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")), "kept for a later sync"


def test_without_wandb_the_run_warns_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    report_run(tmp_path / "run", 0, 300, "report.wandb=offline")
    assert "W&B: " in (tmp_path / "run" / "log.txt").read_text()
    assert len(metrics_log.read(tmp_path / "run" / "metrics.jsonl")) == 3


def test_wandb_has_the_settings_that_are_passed_to_it():
    import wandb

    fields = wandb.Settings(**SETTINGS).model_dump()
    assert {name: fields[name] for name in SETTINGS} == SETTINGS
