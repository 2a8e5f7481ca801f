"""Scores that are computed once."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dist_t2i
from dist_t2i.ablation import scoring
from dist_t2i.data.shard_set import open_set
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.protocol import load_protocol
from models_on_disk import write_run, write_tone_set


class Averages(torch.nn.Module):
    """A feature network for tests: each picture shrunk to 4 x 4."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) * self.scale


JUDGE = FeatureNetwork("Averages", 32, 48, "0" * 64, Averages(), mean=127.0, std=128.0)


def test_features_are_cached(tmp_path):
    network = scoring.CachedFeatures.of(JUDGE, tmp_path)
    pictures = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = network(pictures)
    assert torch.equal(first, JUDGE(pictures)) and network.name == "Averages"
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(network(pictures), first) and file.stat().st_mtime_ns == written
    assert torch.equal(load_file(file)["features"], first)
    network(pictures.flip(0))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_set(write_tone_set(tmp_path_factory.mktemp("sets") / "set"))


def test_scores_are_kept_until_something_changes(data, tmp_path):
    run = write_run(tmp_path / "run", f"data.train={data.folder}", words=data.tokenizer)
    lines = []

    def scores(seeds):
        protocol = dataclasses.replace(load_protocol("openmoji-ablation"), splits=(), seeds=seeds)
        scorer = scoring.RunScorer(data, protocol, tmp_path, lines.append)
        scorer.networks = {"efficientnet-lite0": scoring.CachedFeatures.of(JUDGE, tmp_path / "features")}
        return scorer.scores(run)

    first = scores((0,))
    assert scores((0,)) == json.loads(json.dumps(first)) and len(lines) == 1
    counts = first["parameters"]
    model = dist_t2i.load(run, "cpu")
    parts = (model._parts.generator, model._parts.discriminator)
    numbers = [sum(tensor.numel() for tensor in part.state_dict().values()) for part in parts]
    assert [counts["generator"], counts["discriminator"]] == numbers and counts["text"] > 0
    scores((0, 1))
    assert len(lines) == 2
    Path(run / scoring.FILE).write_text("cut off {")
    scores((0, 1))
    assert len(lines) == 3
