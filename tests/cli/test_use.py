"""sample.py, export.py and evaluate.py as commands."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from dist_t2i.errors import run_command
from models_on_disk import write_run, write_tone_set
from ranks import ROOT
from shard_tool import shard

TOOLS = ROOT / "tools"


def command(name, *arguments):
    done = subprocess.run([sys.executable, TOOLS / name, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def inside(name, *arguments, monkeypatch):
    """The command's exit status, without starting a process for it."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return run_command(importlib.import_module(f"dist_t2i.cli.{name.removesuffix('.py')}").main)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("name", ["sample.py", "export.py", "evaluate.py", "demo.py", "ablate.py", "embeddings.py"])
def test_help_imports_nothing_heavy(name):
    words = [sys.executable, "-X", "importtime", TOOLS / name, "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and not re.search(r"\| +(torch|deepspeed|numpy|PIL|fsspec)\b", done.stderr)


@pytest.mark.slow
def test_sample_writes_a_grid_and_warns(run, tmp_path):
    out = tmp_path / "new" / "grid.png"
    done = command("sample.py", "--run", run, "red apple", "🦄", "--out", out, "--images-per-prompt", 2)
    assert done.returncode == 0
    assert "🦄" in done.stderr and "warning" in done.stderr
    assert Image.open(out).height > 2 * 128


@pytest.mark.slow
def test_export_then_sample_from_it(run, tmp_path, monkeypatch):
    assert command("export.py", "--run", run, "--out", tmp_path / "model").returncode == 0
    for model, out in ((tmp_path / "model", "a.png"), (run, "b.png")):
        arguments = ("--run", model, "red apple", "--out", tmp_path / out)
        assert inside("sample.py", *arguments, monkeypatch=monkeypatch) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_mistakes_are_reported_in_a_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        (("sample.py", "--run", tmp_path / "nowhere", "apple"), "does not exist"),
        (("sample.py", "--run", run, "apple", "--out", tmp_path / "full" / "file" / "a.png"), "--out"),
        (("sample.py", "--run", run, "apple", "--images-per-prompt", 0), "images_per_prompt"),
        (("export.py", "--run", run, "--out", tmp_path / "full"), "choose a new folder"),
        (("evaluate.py", "--run", run), "--data"),
        (("evaluate.py", "--run", run, "--protocol", "coco"), "held-out"),
        (("evaluate.py", "--run", run, "--data", tmp_path), "tools/shard.py"),
        (("evaluate.py", "--run", run, "--weights", "inception"), "expected inception=FILE"),
        (("evaluate.py", "--run", run, "--without", "vgg"), "expected one of efficientnet, inception, clip"),
        (("evaluate.py", "compare", tmp_path / "a.json", tmp_path / "b.json"), "cannot be read"),
        (("evaluate.py", "captions", "--data", tmp_path, "--protocol", "quick"), "tools/shard.py"),
    ):
        assert inside(*arguments, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


@pytest.mark.slow
def test_evaluate_writes_scores_that_the_export_shows(tmp_path, monkeypatch):
    """From pictures to a set, a model, its scores by the real feature network, and its model card."""
    pytest.importorskip("efficientnet_lite_pytorch")
    for i in range(12):
        Image.effect_mandelbrot((40, 40), (-3, -2.5 + i / 9, 2, 2.5), 20 + i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture number {i}")
    out = tmp_path / "set"
    shard("folder", "--images", tmp_path, "--out", out, "--holdout", 0.6)
    from dist_t2i.data.tokenizer import Tokenizer

    run = write_run(tmp_path / "run", f"data.train={out}", words=Tokenizer.load(out / "tokenizer.json"))
    done = command("evaluate.py", "--run", run)
    assert done.returncode == 0, done.stderr
    assert "KID (EfficientNet-Lite0)" in done.stdout and "floor" in done.stdout
    scores = json.loads((run / "scores.json").read_text())
    assert scores["protocol"]["name"] == "held-out" and scores["manifest"]["images_seen"] == 64
    assert inside("export.py", "--run", run, "--out", tmp_path / "model", monkeypatch=monkeypatch) == 0
    assert "KID (EfficientNet-Lite0)" in (tmp_path / "model" / "README.md").read_text()


OWN = """
name: own
version: 1
splits: []
captions: hash
captions_per_picture: 1
captions_sha256: ""
min_pictures: 4
max_pictures: 2000
seeds: [0, 1]
ema: true
truncation: 0.7
crop: centre
resize: bilinear-antialias
metrics: [r-precision/own, clip-score/own, tone-order]
gallery: 100
neighbours: 3
kid_subsets: 100
kid_subset_size: 1000
inception_splits: 10
resamples: 100
costly_resamples: 20
"""


@pytest.mark.slow
def test_four_ranks_write_the_scores_of_one_and_other_captions_are_refused(tmp_path, monkeypatch, capsys):
    """The commands as a user runs them: a custom protocol, torchrun, compare, captions."""
    from dist_t2i.data.shard_set import open_set

    data = write_tone_set(tmp_path / "set", roles=60)
    run = write_run(tmp_path / "run", f"data.train={data}", words=open_set(data).tokenizer)
    (tmp_path / "own.yaml").write_text(OWN)
    one, four = tmp_path / "one.json", tmp_path / "four.json"
    options = ["--run", run, "--protocol", tmp_path / "own.yaml", "--device", "cpu", "--out"]
    done = command("evaluate.py", *options, one)
    assert done.returncode == 0 and "own S_D: not independent" in done.stdout, done.stderr
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone", "--"]
    again = subprocess.run(
        [*ranks, *map(str, [TOOLS / "evaluate.py", *options, four])], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and again.stdout.count("written to") == 1, again.stderr
    a, b = (json.loads(path.read_text()) for path in (one, four))
    assert a["manifest"] == b["manifest"]
    for first, second in zip(a["splits"]["test"]["scores"], b["splits"]["test"]["scores"], strict=True):
        for key, value in first.items():
            assert second[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6))
    assert inside("evaluate.py", "compare", one, four, monkeypatch=monkeypatch) == 0
    assert "r-precision" in capsys.readouterr().out.lower()

    out = tmp_path / "list.txt"
    arguments = ("captions", "--data", data, "--protocol", tmp_path / "own.yaml", "--out", out)
    assert inside("evaluate.py", *arguments, monkeypatch=monkeypatch) == 0
    assert a["manifest"]["captions_sha256"] in capsys.readouterr().out
    assert out.read_bytes() == (run / "captions-own-1.txt").read_bytes()
    other = write_tone_set(tmp_path / "other", roles=30)
    assert inside("evaluate.py", *options, four, "--data", other, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "captions-own-1.txt: these captions of an earlier evaluation differ" in error and "Traceback" not in error
