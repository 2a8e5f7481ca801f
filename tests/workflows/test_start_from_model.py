"""Runs that start from a model of another set: the vocabulary grows, and resuming needs the model no more."""

from __future__ import annotations

import json
import shutil
import signal
import warnings

import pytest
import torch
import yaml

import dist_t2i
from dist_t2i.checkpoint import store
from dist_t2i.data.shard_set import open_set
from dist_t2i.data.tokenizer import Tokenizer, grown
from dist_t2i.inference.model_files import read_model
from dist_t2i.publish.export import export
from models_on_disk import tokenizer, write_run
from runs import CONFIG, RATES, Run, assert_same_state, flat, make_set, wait_for_run

pytestmark = pytest.mark.slow
STILL = ("optimizer.generator_lr=1e-30", "optimizer.discriminator_lr=1e-30", "train.total_images=8")
"""With a learning rate of zero, the first checkpoint holds the weights that the run started with."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run on a set of its own."""
    folder = tmp_path_factory.mktemp("base")
    run = Run(folder / "base", make_set(folder, 200), "train.total_images=200")
    assert run.train() == 0, run.output()
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Another set, with words that the base has never seen."""
    return make_set(tmp_path_factory.mktemp("set"), colors=("crimson", "violet", "teal", "khaki"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, base):
    """The uninterrupted run."""
    mirror = tmp_path_factory.mktemp("mirror")
    run = Run(tmp_path_factory.mktemp("whole") / "run", data, *RATES, f"checkpoint.mirror={mirror}")
    assert run.train(f"train.init={base.folder}") == 0, run.output()
    return run


def ids(tokenizer: Tokenizer) -> dict[str, int]:
    return json.loads(tokenizer.text)["tokenizers"]["model"]["vocab"]


def check_start(run: Run, model, started: dict[str, str]):
    """The run holds the model's weights and a row for every new token. `started`: the model's part (`generator` or
    `discriminator`) -> the engine of the run that trains its text encoder."""
    words, got = Tokenizer.load(run.folder / "tokenizer.json"), run.tensors(8)
    given = {"generator": model.generator, "discriminator": model.discriminator}
    for part, engine in started.items():
        for name, value in given[part].items():
            if f"{engine}/{name}" not in got:
                continue
            rows = got[f"{engine}/{name}"]
            assert torch.allclose(rows[: len(value)], value, rtol=0, atol=1e-20), name
            if not name.endswith(".embedding.weight"):
                assert rows.shape == value.shape
                continue
            assert len(rows) == words.vocab_size > len(value) == model.tokenizer.vocab_size
            for token in range(len(value), len(rows)):
                if parts := words.parts.get(token):
                    assert torch.allclose(rows[token], rows[list(parts)].mean(0), atol=1e-6)
                else:
                    assert 0.1 < rows[token].std() / value[1:].std() < 3


def test_it_starts_with_the_models_weights_and_a_row_for_every_new_token(data, base, tmp_path):
    model = read_model(base.folder)
    run = Run(tmp_path / "run", data, f"train.init={export(base.folder, tmp_path / 'model')}", *STILL)
    assert run.train() == 0, run.output()
    words, own = Tokenizer.load(run.folder / "tokenizer.json"), open_set(data).tokenizer
    assert words == grown(model.tokenizer, own)
    assert words.known_words == model.tokenizer.known_words | own.known_words
    assert ids(model.tokenizer).items() < ids(words).items()
    check_start(run, model, {"generator": "generator", "discriminator": "discriminator"})
    got = run.tensors(8)
    assert all(torch.equal(got[f"ema/{name}"], got[f"generator/{name}"]) for name in model.generator)


def test_a_shared_encoder_grows_too(data, tmp_path):
    base = write_run(tmp_path / "base", *flat(yaml.safe_load(CONFIG)), "text.mode=shared", seed=3)
    run = Run(tmp_path / "run", data, f"train.init={base}", "text.mode=shared", *STILL)
    assert run.train() == 0, run.output()
    check_start(run, read_model(base), {"generator": "generator", "discriminator": "text"})
    check_start(run, read_model(base), {"discriminator": "discriminator"})


def test_a_frozen_encoder_stays_as_configured(data, tmp_path):
    """The run reads the encoder and the tokenizer that it is given, not those of the model."""
    networks, encoders = flat(yaml.safe_load(CONFIG)), []
    for seed, words in enumerate((tokenizer(), open_set(data).tokenizer)):
        encoder = write_run(tmp_path / f"encoder-{seed}", *networks, seed=seed, words=words)
        encoders.append(f"text.frozen={export(encoder, tmp_path / f'frozen-{seed}')}")
    base = write_run(tmp_path / "base", *networks, "text.mode=frozen", encoders[0], seed=3)
    run = Run(tmp_path / "run", data, f"train.init={base}", "text.mode=frozen", encoders[1], *STILL)
    assert run.train() == 0, run.output()
    assert Tokenizer.load(run.folder / "tokenizer.json") == open_set(data).tokenizer
    check_start(run, read_model(base), {"generator": "generator", "discriminator": "discriminator"})


def test_killed_and_resumed_is_bitwise_the_whole_run_and_needs_the_model_no_more(whole, data, base, tmp_path):
    run = Run(tmp_path / "run", data, *RATES)
    process = run.start(f"train.init={base.folder}")[0]
    wait_for_run(lambda: run.checkpoints(), process, run, allow_exit=True)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    for name in run.checkpoints():
        if name > "images-000000032":
            shutil.rmtree(run.folder / "checkpoints" / name)
    assert run.train("train.init=gone", "data.workers=0") == 0, run.output()
    assert_same_state(run, whole)
    assert run.losses() == whole.losses()
    assert (run.folder / "tokenizer.json").read_text() == (whole.folder / "tokenizer.json").read_text()
    for name in run.checkpoints():
        if name > "images-000000032":
            shutil.rmtree(run.folder / "checkpoints" / name)
    two = ("engine.generator_stage=2", "engine.discriminator_stage=1")
    assert run.train("train.init=gone", *two, ranks=2) == 0, run.output()
    assert_same_state(run, whole, tolerance=1e-4)


def test_a_lost_folder_resumes_from_the_mirror_with_the_grown_tokenizer(whole, data, tmp_path):
    url = next(text.partition("=")[2] for text in whole.overrides if text.startswith("checkpoint.mirror="))
    run = Run(tmp_path / "run", data, *RATES, f"checkpoint.mirror={url}", "train.init=gone")
    assert run.train() == 0, run.output()
    assert_same_state(run, whole)
    assert Tokenizer.load(run.folder / "tokenizer.json") == Tokenizer.load(whole.folder / "tokenizer.json")


def test_the_model_knows_both_sets_and_says_where_it_started(whole, base, tmp_path):
    folder, sha256 = export(whole.folder, tmp_path / "model"), read_model(base.folder).sha256()
    for path in (whole.folder / "config.yaml", folder / "config.yaml", folder / "README.md"):
        assert (
            f"Training started from the model base (200 images seen, SHA-256 of the weights {sha256})"
            in path.read_text()
        )
    assert str(base.folder.parent) not in (folder / "config.yaml").read_text() + (folder / "model.json").read_text()
    again = export(folder, tmp_path / "again")
    assert sha256 in (again / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dist_t2i.load(folder, "cpu").generate(["a crimson square", "a red circle"], seed=0)


def test_other_networks_are_refused_before_the_run_begins(base, data, tmp_path):
    run = Run(tmp_path / "run", data, f"train.init={base.folder}", *STILL)
    assert run.train("model.discriminator.embedding=8", "data.image_size=64", ranks=2) == 2
    said = run.output()
    assert "train.init: the networks of" in said and "Traceback" not in said
    assert "data.image_size: 64 here, 32 in the model" in said
    assert "model.discriminator.embedding: 8 here, 16 in the model" in said
    assert run.train() == 0, run.output()
    assert store.load_latest(run.folder).state["init"]["images"] == 200
