"""A protocol on a small set and an untrained model: real shards, and the real feature network if it is installed."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

import dist_t2i
from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import UserError
from dist_t2i.eval import compare, metrics, scoring
from dist_t2i.eval import ranks as ranks_module
from dist_t2i.eval.evaluate import code_files, evaluate, manifest, protocol_for
from dist_t2i.eval.measure import Features, generate
from dist_t2i.eval.protocol import Protocol, load_protocol
from dist_t2i.eval.ranks import Ranks
from dist_t2i.eval.scores import markdown, read_scores, table
from dist_t2i.eval.selection import select
from dist_t2i.eval.skin_tones import group_of
from judges import JUDGE
from models_on_disk import write_run, write_tone_set
from ranks import ROOT, run_ranks

OFFLINE = tuple(
    f"{metric}/efficientnet-lite0" for metric in ("kid", "retrieval", "fid", "precision-recall", "diversity")
)
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("torch_fidelity"), reason="needs torch-fidelity")
QUICK = Protocol(
    "test", seeds=(0, 1), resamples=50, metrics=(*OFFLINE, "r-precision/own", "clip-score/own", "tone-order")
)


JUDGES = {"efficientnet-lite0": JUDGE}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_set(write_tone_set(tmp_path_factory.mktemp("sets") / "set"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    run = write_run(tmp_path_factory.mktemp("runs") / "run", f"data.train={data.folder}", words=data.tokenizer)
    return dist_t2i.load(run, "cpu")


def scored(model, data, protocol=QUICK, **more):
    return evaluate(model, data, protocol, say=lambda line: None, networks=JUDGES, **more)


@pytest.fixture(scope="module")
def scores(model, data):
    return scored(model, data)


def test_every_number_has_interval_floor_and_ceiling(scores, data):
    found = scores.splits["test"]
    assert found.pictures == len(data.samples("test")) > 10
    assert [score.key for score in found.scores] == [
        "kid", "recall_at_1", "recall_at_5", "fid", "precision", "recall", "diversity_other_captions", "r_precision_own", "clip_score_own", "tone_order",
    ]  # fmt: skip
    for score in found.scores:
        assert score.low <= score.value <= score.high
        assert score.floor and (score.ceiling or score.key == "tone_order")
    kid = scores["test", "kid"]
    assert kid.name == "kernel distance (Averages)" and kid.value > kid.ceiling["real pictures with noise"]
    assert abs(kid.floor["one half of the real pictures against the other"]) < 0.1 * kid.value
    assert scores["test", "recall_at_1"].ceiling["the real pictures mirrored"] <= 1
    with pytest.raises(KeyError):
        scores["test", "is"]


def test_a_number_never_carries_the_name_of_a_metric_that_it_is_not(scores):
    assert scores["test", "fid"].name == "Fréchet distance (Averages)"
    own = scores["test", "r_precision_own"]
    assert own.name == "R-precision, 1 of 28 (its own S_D: not independent)"
    assert not any(name in table(scores.as_json()) for name in ("FID", "KID", "CLIP"))


def test_the_library_gives_the_frechet_distance(scores, model, data):
    """The value equals torch-fidelity's, and lies in the interval of our resamples."""
    score = scores["test", "fid"]
    assert score.low < score.value < score.high
    assert score.floor["one half of the real pictures against the other"] < score.value


def test_real_pairs_are_in_order(scores):
    ceiling = scores["test", "tone_order"].ceiling
    assert not ceiling or set(ceiling.values()) == {1.0}


def test_the_same_evaluation_gives_the_same_numbers(scores, model, data):
    assert scored(model, data).as_json() == scores.as_json()


def test_what_the_judges_saw_of_real_pictures_may_be_kept(scores, model, data):
    cache = {"test": {}}
    assert scored(model, data, cache=cache).splits == scores.splits
    assert cache["test"]
    assert scored(model, data, cache=cache).splits == scores.splits


def test_what_a_model_sees_of_real_pictures_is_never_another_models(data, tmp_path):
    """Also not the model's own earlier features: D changes between two evaluations of a run."""
    cache = {"test": {}}
    runs = [write_run(tmp_path / str(seed), seed=seed, words=data.tokenizer) for seed in (1, 2)]
    first, second = (dist_t2i.load(run, "cpu") for run in runs)
    before = scored(first, data, cache=cache)
    after = scored(second, data, cache=cache)
    assert after.splits == scored(second, data).splits != before.splits


def scored_on_a_rank(run, folder):
    """The scores that each of several ranks gets."""
    torch.distributed.init_process_group("gloo")
    ranks_module.CHUNK = 4
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    found = scored(dist_t2i.load(run, "cpu"), open_set(folder), ranks=ranks)
    return found.as_json()


@pytest.mark.slow
def test_four_ranks_give_the_numbers_of_one(scores, model, data, monkeypatch):
    """Feature networks get chunks of four rows, so that every rank has some chunks, but not all ranks have the same
    number."""
    here = [str(ROOT / "tests" / "support"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(here))
    everywhere = run_ranks(4, scored_on_a_rank, model.files.folder, data.folder)
    for found in everywhere:
        assert found["splits"].keys() == scores.splits.keys()
        for ours, theirs in zip(scores.splits["test"].scores, found["splits"]["test"]["scores"], strict=True):
            assert (ours.key, ours.name) == (theirs["key"], theirs["name"])
            for name in ("value", "low", "high"):
                assert theirs[name] == pytest.approx(getattr(ours, name), abs=1e-6)
            for end in ("floor", "ceiling"):
                assert theirs[end] == pytest.approx(dict(getattr(ours, end)), abs=1e-6)
        assert found["manifest"]["reference_sha256"] == scores.manifest["reference_sha256"]


def test_the_manifest_says_what_the_numbers_depend_on(scores, model, data):
    assert scores.manifest["weights_sha256"] == model.files.sha256()
    assert scores.manifest["data_fingerprint"] == data.fingerprint
    judge = scores.manifest["judges"]["efficientnet-lite0"]
    assert judge == {"name": "Averages", "weights_sha256": "0" * 64, "side": 32}
    assert len(scores.manifest["code"]["sha256"]) == len(scores.manifest["captions_sha256"]) == 64
    assert scores.manifest["left_out"] == []
    other = Protocol("test", seeds=(0, 2), resamples=50)
    assert manifest(model, data, other, JUDGES)["protocol_sha256"] != scores.manifest["protocol_sha256"]


def test_the_hash_of_the_code_covers_every_package():
    packages = {
        path.parent.relative_to(ROOT / "dist_t2i").as_posix() for path in (ROOT / "dist_t2i").rglob("__init__.py")
    }
    assert {"eval/judges", "models", "training", "utils"} < packages
    assert {Path(name).parent.as_posix() for name in code_files()} == packages
    assert code_files()["eval/metrics.py"] == Path(metrics.__file__)


def test_what_no_judge_is_there_for_is_left_out_and_said(model, data):
    found = scored(model, data, Protocol("test", resamples=10, metrics=("tone-order", "clip-score/clip")))
    assert [score.key for score in found.splits["test"].scores] == ["tone_order"]
    assert found.manifest["left_out"] == ["clip-score/clip"]


def test_saved_and_shown(scores, tmp_path):
    scores.save(tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text())
    for text in (table(read), markdown(read)):
        assert "kernel distance (Averages)" in text and "chance" in text and "half of the real" in text


def test_compared_or_not_and_why(scores, model, data, tmp_path):
    scores.save(tmp_path / "a.json")
    a = read_scores(tmp_path / "a.json")
    b = json.loads(json.dumps(a))
    b["splits"]["test"]["scores"][0] |= {"value": 0.5, "low": 0.4, "high": 0.6}
    b["manifest"]["code"]["sha256"] = "1" * 64
    said = compare.table(a, b, ("a", "b"))
    assert not compare.differences(a, b)
    assert "0.5 (0.4 to 0.6)" in said and "do not overlap" in said and "note: code" in said

    fewer = scored(model, data, Protocol("test", seeds=(0,), resamples=50, metrics=QUICK.metrics)).as_json()
    (line,) = compare.differences(a, json.loads(json.dumps(fewer)))
    assert line.startswith("protocol_sha256") and "seeds" in line
    for key, value in (("captions_sha256", "1" * 64), ("image_size", 64), ("reference_sha256", {"test": "1"})):
        other = json.loads(json.dumps(a))
        other["manifest"][key] = value
        (line,) = compare.differences(a, other)
        assert line.startswith(key)
        assert "not comparable" in compare.table(a, other, ("a", "b"))
    other = json.loads(json.dumps(a))
    other["manifest"]["color_sharpness"] = 1.4
    assert not compare.differences(a, other)
    (line,) = compare.remarks(a, other)
    assert line.startswith("color_sharpness") and "1.0 and 1.4" in line
    other["manifest"]["colour_sharpness"] = other["manifest"].pop("color_sharpness")  # as earlier versions wrote it
    (tmp_path / "earlier.json").write_text(json.dumps(other))
    assert compare.remarks(a, read_scores(tmp_path / "earlier.json")) == [line]
    other = json.loads(json.dumps(a))
    other["manifest"]["judges"]["efficientnet-lite0"]["weights_sha256"] = "1" * 64
    said = compare.table(a, other, ("a", "b"))
    assert said.count("feature networks' weights_sha256 differ") == 7 and not compare.differences(a, other)
    other = json.loads(json.dumps(a))
    other["protocol"]["version"] = 2
    assert compare.differences(a, other) == ["protocol: test version 1 and test version 2"]


def test_files_that_are_no_scores(tmp_path):
    (tmp_path / "old.json").write_text('{"format": 1}')
    (tmp_path / "other.json").write_text("[]")
    for name, said in (("old.json", "evaluate again"), ("other.json", "not contain"), ("none.json", "cannot be read")):
        with pytest.raises(UserError, match=said):
            read_scores(tmp_path / name)


def test_pairs_share_their_noise(model):
    light, dark = "role number 3 light skin tone", "role number 3 dark skin tone"
    assert group_of(light) == group_of(dark) == light
    assert group_of("red apple") == "red apple"
    pictures = generate(model, [light, dark, light], 0, QUICK)
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])


def test_perfect_pictures_reach_the_ends_of_the_scales(data):
    """The real pictures are scored in place of generated pictures."""
    selection = select(data, "test", QUICK)
    real = torch.stack([selection.picture(row, 32) for row in range(len(selection))])
    features = JUDGE(real)
    copies = dict.fromkeys(("real", "mirrored", "noisy", "shrunk", "blurred", "random"), features)
    weights = metrics.bootstrap_weights(range(len(selection)), 50)
    case = scoring.Case("x", JUDGE, Features(features[None], copies, None), selection.captions, QUICK, weights)
    assert scoring.kid_scores(case)[0].value < 0.01
    assert scoring.retrieval_scores(case)[0].value == 1.0
    assert [score.value for score in scoring.precision_recall_scores(case)] == [1.0, 1.0]
    assert scoring.fid_scores(case)[0].value == pytest.approx(0, abs=1e-4)


def test_several_captions_a_picture(model, data):
    """One picture is generated per caption; captions repeat if there are too few."""
    protocol = Protocol("test", captions_per_picture=3, seeds=(0, 1), resamples=10, metrics=QUICK.metrics)
    found = scored(model, data, protocol)
    assert {score.key for score in found.splits["test"].scores} >= {"kid", "fid", "r_precision_own", "tone_order"}
    once = scored(model, data, Protocol("test", seeds=(0, 1), resamples=10, metrics=QUICK.metrics))
    assert found["test", "kid"].value == pytest.approx(once["test", "kid"].value), "one caption, three times"


def test_sets_that_cannot_be_used(model, data):
    with pytest.raises(UserError, match="no split test-combinations, test-nouns"):
        scored(model, data, load_protocol("openmoji"))
    with pytest.raises(UserError, match="needs at least"):
        scored(model, data, Protocol("test", max_pictures=3))
    with pytest.raises(UserError, match=r"28 pictures, but .* 30,000"):
        scored(model, data, load_protocol("coco30k"))
    assert protocol_for(data).name == "held-out"
