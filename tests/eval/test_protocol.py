"""The protocol on a small set and an untrained model: real shards, the real judge where it is installed."""

import json

import pytest
import torch

import dist_t2i
from dist_t2i.data.shards import open_set
from dist_t2i.errors import UserError
from dist_t2i.eval import protocol as rules
from dist_t2i.eval.features import FeatureNetwork
from dist_t2i.eval.scores import markdown, table
from models_on_disk import write_run, write_tone_set

QUICK = rules.Protocol("test", seeds=(0, 1), resamples=50)


class Averages(torch.nn.Module):
    """A judge for tests: each picture shrunk to 8 x 8."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) * self.scale


JUDGE = FeatureNetwork("Averages", 32, 192, "0" * 64, Averages(), mean=127.0, std=128.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_set(write_tone_set(tmp_path_factory.mktemp("sets") / "set"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    run = write_run(tmp_path_factory.mktemp("runs") / "run", f"data.train={data.folder}", words=data.tokenizer)
    return dist_t2i.load(run, "cpu")


@pytest.fixture(scope="module")
def scores(model, data):
    return rules.evaluate(model, data, QUICK, say=lambda line: None, judge=JUDGE)


def test_every_number_has_interval_floor_and_ceiling(scores, data):
    found = scores.splits["test"]
    assert found.pictures == len(data.samples("test")) > 10
    assert [score.key for score in found.scores] == ["kid", "recall_at_1", "recall_at_5", "tone_order"]
    for score in found.scores:
        assert score.low <= score.value <= score.high
        assert score.floor and (score.ceiling or score.key == "tone_order")
    kid = scores["test", "kid"]
    assert kid.name == "KID (Averages)" and kid.value > max(kid.ceiling.values())
    assert abs(kid.floor["one half of the real pictures against the other"]) < 0.1 * kid.value
    assert scores["test", "recall_at_1"].ceiling["the real pictures mirrored"] <= 1
    with pytest.raises(KeyError):
        scores["test", "fid"]


def test_real_pairs_are_in_order(scores):
    ceiling = scores["test", "tone_order"].ceiling
    assert not ceiling or set(ceiling.values()) == {1.0}


def test_the_same_evaluation_gives_the_same_numbers(scores, model, data):
    again = rules.evaluate(model, data, QUICK, say=lambda line: None, judge=JUDGE)
    assert again.as_json() == scores.as_json()


def test_the_manifest_says_what_the_numbers_depend_on(scores, model, data):
    assert scores.manifest["weights_sha256"] == model.files.sha256()
    assert scores.manifest["data_fingerprint"] == data.fingerprint
    assert scores.manifest["judge"] == {"name": "Averages", "weights_sha256": "0" * 64, "side": 32}
    other = rules.Protocol("test", seeds=(0, 2), resamples=50)
    assert rules.manifest(model, data, other, JUDGE)["protocol_sha256"] != scores.manifest["protocol_sha256"]


def test_saved_and_shown(scores, tmp_path):
    scores.save(tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text())
    for text in (table(read), markdown(read)):
        assert "KID (Averages)" in text and "chance" in text and "half of the real" in text


def test_pairs_share_their_noise(model):
    light, dark = "role number 3 light skin tone", "role number 3 dark skin tone"
    assert rules.group_of(light) == rules.group_of(dark) == light
    assert rules.group_of("red apple") == "red apple"
    pictures = rules.generate(model, [light, dark, light], 0, QUICK)
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])


def test_perfect_pictures_reach_the_ends_of_the_scales(data):
    """The scores of the real pictures themselves, taken for generated ones."""
    captions, real = rules.real_pictures(data, "test", 32, 100)
    features = JUDGE(real)
    reals = rules.References.of(real, JUDGE)
    weights = rules.metrics.bootstrap_weights(range(len(captions)), 50)
    assert rules.kid_score(features[None], reals, weights, "Averages").value < 0.01
    assert rules.recall_score(1, features[None], reals, weights, 100, "Averages").value == 1.0


def test_sets_that_cannot_be_used(model, data):
    with pytest.raises(UserError, match="no split test-combinations, test-nouns"):
        rules.evaluate(model, data, rules.PROTOCOLS["openmoji"], judge=JUDGE)
    with pytest.raises(UserError, match="too few"):
        rules.evaluate(model, data, rules.Protocol("test", max_pictures=3), judge=JUDGE, say=lambda line: None)
    assert rules.protocol_for(data).name == "held-out"
