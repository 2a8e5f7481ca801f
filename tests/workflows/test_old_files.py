"""Files of earlier versions still work: a model loads, a run resumes, a set streams.

Each folder of tests/fixtures holds the files of one version, and the results of that version for these files. The tests
compare the results of the current version with these results. The tolerances are for other processors. On a processor
without AVX-512, losses differed by 2e-6 of their size, gradient norms by 2e-6 and tensors by 1e-5; with SSE alone by
3e-6, 2e-5 and 2e-4. On the same processor, nothing differed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import dist_t2i
from dist_t2i.config import files as config_files
from dist_t2i.data.shard_set import open_set
from dist_t2i.inference.pipeline import TextToImage
from pictures import stream_of
from ranks import ROOT
from runs import Run, whole_lines
from shard_tool import shard

FIXTURES = ROOT / "tests" / "fixtures"
CONFIG = "shapes.yaml"
PROMPT, SEED = "a red circle", 3
SAMPLES = 64


@pytest.fixture(params=sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
def old(request, tmp_path):
    """A copy of everything that one version wrote."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "old"))


def streamed(folder: Path) -> list[dict]:
    """The first samples of the set, as the run reads them: key, caption, its tokens, and the sum of the picture's bytes."""
    config = config_files.load(folder / CONFIG, [f"data.train={folder / 'set'}", "data.workers=0"])
    stream = stream_of(config, open_set(str(folder / "set")).tokenizer)
    rows: list[dict] = []
    try:
        while len(rows) < SAMPLES:
            batch = next(stream)
            for row, key in enumerate(batch.keys):
                tokens = batch.tokens[row, : batch.lengths[row]].tolist()
                pixels = int(batch.images[row].sum(dtype=torch.int64))
                rows.append({"key": key, "caption": batch.captions[row], "tokens": tokens, "pixels": pixels})
        assert not stream.bad_counts
    finally:
        stream.close()
    return rows[:SAMPLES]


def resumed(folder: Path) -> tuple[list[dict], dict[str, dict[str, float]]]:
    """Resumes the run to its end; returns the new lines of metrics.jsonl, and the sum and norm of every tensor."""
    run = Run(folder / "run", folder / "set", "report.every_steps=1")
    shutil.copy(folder / CONFIG, run.config)
    (before,) = run.checkpoints()
    assert run.train() == 0, run.output()
    lines = [line for line in run.metrics() if line["images"] > int(before.removeprefix("images-"))]
    tensors = {name: value.double() for name, value in run.tensors(lines[-1]["images"]).items()}
    return lines, {name: {"sum": float(value.sum()), "norm": float(value.norm())} for name, value in tensors.items()}


def picture(model: TextToImage) -> numpy.ndarray:
    """The model's picture of PROMPT. A warning about an unknown word is an error here."""
    return numpy.asarray(model.generate([PROMPT], seed=SEED)[0])


@pytest.mark.filterwarnings("error::dist_t2i.inference.pipeline.PromptWarning")
def test_an_exported_model_makes_the_same_picture(old):
    model = dist_t2i.load(old / "export", "cpu")
    expected = numpy.asarray(Image.open(old / "expected.png"), dtype=float)
    assert expected.std() > 40, "a blank picture would show nothing"
    assert numpy.abs(picture(model) - expected).mean() <= 0.5  # of 255; without color_sharpness it is 1.4
    for which in ("g", "d"):
        red, green = model.embed_text([PROMPT, "a green square"], which=which)
        assert red.isfinite().all() and not torch.allclose(red, green)
    shown = [Image.open(old / "expected.png")]
    assert model.score(shown, [PROMPT]).item() == pytest.approx(json.loads((old / "score.json").read_text()), abs=1e-3)


def test_a_run_folder_is_the_model_that_was_exported(old):
    model, exported = (dist_t2i.load(old / name, "cpu") for name in ("run", "export"))
    assert model.images_seen == exported.images_seen and model.files.sha256() == exported.files.sha256()
    assert numpy.array_equal(picture(model), picture(exported))


@pytest.mark.slow
def test_a_run_goes_on_as_it_would_have(old):
    known = {line["images"]: line for line in whole_lines(old / "resumed_metrics.jsonl")}
    lines, tensors = resumed(old)
    assert [line["images"] for line in lines] == list(known)
    for line in lines:
        then = known[line["images"]]
        compared = [key for key in then if key.startswith(("loss/", "logit/", "grad/", "fake/", "lr"))]
        assert len(compared) > 8
        for key in compared:
            share = 1e-4 if key.startswith("grad/") else 1e-5
            assert line[key] == pytest.approx(then[key], rel=share, abs=1e-6), (line["images"], key)
    stored = json.loads((old / "resumed_tensors.json").read_text())
    assert set(tensors) == set(stored)
    for name, then in stored.items():
        size = max(1.0, then["norm"])
        assert tensors[name]["norm"] == pytest.approx(then["norm"], abs=1e-4 * size), name
        assert tensors[name]["sum"] == pytest.approx(then["sum"], abs=1e-3 * size), name


def test_a_set_streams_in_the_same_order(old):
    stored = json.loads((old / "stream.json").read_text())
    assert len(stored) == SAMPLES and len({row["key"] for row in stored}) > SAMPLES // 4
    assert streamed(old) == stored


def test_a_set_is_what_its_manifest_says(old, tmp_path):
    assert "indexes and their members match the manifest" in shard("verify", old / "set").stdout
    said = shard("inspect", old / "set", "--sheet", tmp_path / "sheet.png").stdout
    assert "train" in said and "test" in said and (tmp_path / "sheet.png").exists()


def test_no_path_of_a_machine_is_in_the_files():
    """Users publish runs and models. These files were made with relative paths, and contain no absolute path."""
    roots = [f"/{name}/".encode() for name in ("home", "root", "tmp", "work", "Users")]
    for path in FIXTURES.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [root for root in roots if root in content], path
