"""Training of edits in real runs: started from a text-to-image model, resumed to the bit, and equal on two ranks."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from dist_t2i.checkpoint import store
from dist_t2i.config.files import loads
from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import ConfigError
from dist_t2i.training.setup import read_initial
from models_on_disk import tokenizer, write_run
from runs import CONFIG, RATES, Run, assert_same_state, flat, make_set

pytestmark = pytest.mark.slow
EDIT = ("edit.width=8", "edit.words=1", "loss.edit_target=5", "report.sample_every_images=40", *RATES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    """A text-to-image model of the same networks."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return write_run(folder, *flat(yaml.safe_load(CONFIG)), seed=5, words=open_set(data).tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, base):
    """The uninterrupted run."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", data, *EDIT, f"edit.init={base}")
    assert run.train() == 0, run.output()
    return run


def test_it_begins_with_the_models_weights(data, base, tmp_path):
    """With a learning rate of zero the weights stay the same: the model's weights, and an encoder without an effect."""
    rates = ("optimizer.generator_lr=1e-30", "optimizer.discriminator_lr=1e-30", "train.total_images=8")
    run = Run(tmp_path / "run", data, *EDIT, f"edit.init={base}", *rates)
    assert run.train() == 0, run.output()
    given, got = store.load_latest(base), run.tensors(8)
    for file, engine in (("ema", "generator"), ("discriminator", "discriminator")):
        for name, value in given.tensors(file).items():
            assert torch.allclose(got[f"{engine}/{name}"], value, rtol=0, atol=1e-20), name
    assert got["generator/source.stem.weight"].any() and got["generator/source.keep.conv.weight"].abs().max() < 1e-20


def test_resumed_is_bitwise_the_whole_run_and_needs_the_model_no_more(whole, data, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    for name in whole.checkpoints():
        if name > "images-000000032":
            shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    run = Run(tmp_path / "run", data, *EDIT, "edit.init=gone", "data.workers=0")
    assert run.train() == 0, run.output()
    assert_same_state(run, whole)
    assert run.losses() == whole.losses()
    last = run.metrics()[-1]
    assert last["loss/g_reconstruction"] > 0 and last["loss/g_edit_target"] > 0
    assert (run.folder / "samples").is_dir()


def test_two_ranks_are_one(whole, data, base, tmp_path):
    run = Run(
        tmp_path / "run", data, *EDIT, f"edit.init={base}", "engine.generator_stage=2", "engine.discriminator_stage=1"
    )
    assert run.train(ranks=2) == 0, run.output()
    assert_same_state(run, whole, tolerance=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("text.embedding=8",), "text.embedding: 8 here, 16 in the model"),
        (("edit.init=nowhere",), "edit.init: nowhere does not exist"),
        (("edit.width=0",), "only read if edit.width is not 0"),
        (("edit.own=0.95",), "its sum with edit.none=0.1 must not exceed 1"),
        ((), r"the tokenizer of .* differs"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(base, overrides, said):
    with pytest.raises(ConfigError, match=said):
        read_initial(loads(CONFIG, [*EDIT, f"edit.init={base}", *overrides]), tokenizer())
