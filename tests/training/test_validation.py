"""Scores during training: real runs with and without scores, stopped and resumed, on one rank and on two."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml

import dist_t2i
from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.store import Retention
from dist_t2i.config.files import loads
from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import UserError
from dist_t2i.eval.evaluate import evaluate
from dist_t2i.eval.protocol import Protocol, load_protocol
from dist_t2i.inference import model_files
from dist_t2i.training.validation import Validation, read_protocol
from models_on_disk import write_tone_set
from runs import Run

pytestmark = pytest.mark.slow
TOTAL = 80


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("efficientnet_lite_pytorch")
    return write_tone_set(tmp_path_factory.mktemp("sets") / "set")


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """A user's protocol file with eight pictures."""
    path = tmp_path_factory.mktemp("protocols") / "tiny.yaml"
    rules = Protocol("tiny", max_pictures=8, seeds=(0,), resamples=10, metrics=("kid/efficientnet-lite0", "tone-order"))
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(rules).items()}
    path.write_text(yaml.safe_dump(plain))
    return path


def evaluated(folder, data, protocol, *overrides):
    settings = ("eval.every_images=16", f"eval.protocol={protocol}", "checkpoint.keep_last=2")
    return Run(folder, data, *settings, *overrides)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    run = Run(tmp_path_factory.mktemp("runs") / "plain", data)
    assert run.train() == 0, run.output()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, protocol):
    run = evaluated(tmp_path_factory.mktemp("runs") / "whole", data, protocol)
    assert run.train() == 0, run.output()
    return run


def scores(run):
    """Images seen -> scores, from metrics.jsonl."""
    lines = [line for line in run.metrics() if any(name.startswith("eval/") for name in line)]
    assert len({line["images"] for line in lines}) == len(lines)
    return {line["images"]: {k: v for k, v in line.items() if k.startswith("eval/")} for line in lines}


def best_of(run):
    """Images seen at the best KID: the first of the lowest values."""
    found = scores(run)
    return min(found, key=lambda images: (found[images]["eval/test/kid"], images))


def assert_same(run, other, images=TOTAL):
    ours, theirs = run.tensors(images), other.tensors(images)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_is_the_same_to_the_bit(whole, plain):
    assert_same(whole, plain)
    losses = whole.losses()
    assert {images: values for images, values in losses.items() if values} == plain.losses()


def test_scores_are_logged_and_the_best_checkpoint_survives(whole):
    found, best = scores(whole), best_of(whole)
    assert list(found) == [16, 32, 48, 64, 80]
    assert found[16].keys() == {"eval/test/kid", "eval/test/tone_order", "eval/test/near_copies"}
    assert all(0 <= values["eval/test/near_copies"] <= 1 for values in found.values())
    bests = [
        n
        for n in found
        if found[n]["eval/test/kid"] < min([found[m]["eval/test/kid"] for m in found if m < n] or [1e9])
    ]
    saved = sorted({32, 64, TOTAL, *bests})  # every 32 images, at the end, and at the best scores so far
    assert whole.checkpoints() == [f"images-{images:09d}" for images in sorted({best, *saved[-2:]})]
    state = store.load_latest(whole.folder).state["evaluation"]
    assert state["best"] == {"images": best, "value": found[best]["eval/test/kid"]} and state["at"] == TOTAL
    assert "evaluated at 16 images: test/kid" in (whole.folder / "log.txt").read_text()


@pytest.fixture
def one_thread():
    """The number of threads of the runs, because the last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_they_are_what_the_checkpoint_is_scored_with(whole, data, protocol, one_thread):
    """Equal to the bit to the scores of the program that evaluates checkpoints; the manifest names the same weights."""
    best = best_of(whole)
    model = dist_t2i.load(whole.folder / "checkpoints" / f"images-{best:09d}", "cpu")
    assert model.images_seen == best
    again = evaluate(model, open_set(data), load_protocol(protocol), say=lambda line: None).as_json()
    kept = json.loads((whole.folder / "evaluations" / f"images-{best:09d}.json").read_text())
    assert kept["splits"] == json.loads(json.dumps(again["splits"]))
    assert kept["manifest"]["weights_sha256"] == again["manifest"]["weights_sha256"]


def test_gone_on_with_it_is_the_run_that_was_not_stopped(whole, data, protocol, tmp_path):
    run = evaluated(tmp_path / "run", data, protocol)
    shutil.copytree(whole.folder, run.folder)
    shutil.rmtree(run.folder / "checkpoints" / f"images-{TOTAL:09d}")
    assert run.train() == 0, run.output()
    assert scores(run) == scores(whole) and run.checkpoints() == whole.checkpoints()
    assert store.load_latest(run.folder).state == store.load_latest(whole.folder).state
    assert_same(run, whole)


def test_two_ranks_wait_for_the_one_that_judges(data, protocol, tmp_path):
    """The watchdog lets the other ranks wait, and all ranks continue together."""
    run = evaluated(tmp_path / "run", data, protocol, "train.hang_seconds=10", "engine.generator_stage=2")
    assert run.train("eval.every_images=40", "train.total_images=80", ranks=2) == 0, run.output()
    assert list(scores(run)) == [40, 80]
    assert not (run.folder / "ranks" / "hang.json").exists()


def test_a_mistake_is_told_once_before_training(data, protocol, tmp_path):
    run = evaluated(tmp_path / "run", data, protocol)
    assert run.train("eval.metric=fid", ranks=2) == 2
    lines = [line for line in run.output().splitlines() if line.startswith("error:")]
    assert lines == ["error: eval.metric: protocol tiny has no score 'fid'; it has kid, tone_order"]
    assert "Traceback" not in run.output()


def test_other_mistakes_are_told_in_a_line(data, protocol, tmp_path):
    rules = yaml.safe_load(protocol.read_text())
    (tmp_path / "raw.yaml").write_text(yaml.safe_dump({**rules, "ema": False}))
    for override, said in (
        ("eval.protocol=slow", "no protocol 'slow'; name one of"),
        ("eval.protocol=openmoji", "no split test-combinations"),
        ("eval.data=nowhere", "there is no set"),
        (f"eval.protocol={tmp_path / 'raw.yaml'}", "training scores the moving average"),
    ):
        config = loads("", [f"data.train={data}", f"eval.protocol={protocol}", override])
        with pytest.raises(UserError) as told:
            cpu = torch.device("cpu")
            checked = read_protocol(config.eval)
            validation = Validation(tmp_path, config.eval, checked, config.train, open_set(data), cpu, print)
            validation.prepare(config.data, lambda generator, discriminator, images: pytest.fail("not asked for"))
        assert said in str(told.value) and "\n" not in str(told.value)


def test_retention_keeps_the_best():
    assert Retention(1).expired([8, 16, 24]) == [8, 16]
    state = {"evaluation": {"best": {"images": 8, "value": 1.0}}}
    assert Retention(1).given(state).expired([8, 16, 24]) == [16]
    assert Retention(1).given({"evaluation": None}) == Retention(1).given({}) == Retention(1)


def test_weights_as_they_are_instead_of_the_average(whole):
    averaged, plain = model_files.read_model(whole.folder), model_files.read_model(whole.folder, ema=False)
    assert averaged.generator.keys() == plain.generator.keys()
    assert not all(torch.equal(averaged.generator[name], plain.generator[name]) for name in plain.generator)
