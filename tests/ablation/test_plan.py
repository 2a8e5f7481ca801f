"""The file of an ablation: the configurations of its arms and seeds, and one report of all mistakes in it."""

from pathlib import Path

import pytest

from dist_t2i.ablation import plan as plans
from dist_t2i.errors import ConfigError
from ranks import ROOT

BASE = "train: {total_images: 640, global_batch: 16}\ndata: {image_size: 32}\n"
GOOD = """
base: base.yaml
data: a/set
seeds: 2
overrides: [train.global_batch=8]
protocol: held-out
arms:
  dual:
  shared: {label: one for both, overrides: [text.mode=shared]}
  given: {sentences: true, overrides: [text.mode=frozen]}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "ablation-mine.yaml"
    path.write_text(GOOD)
    return path


def test_every_run_has_its_configuration(file):
    plan = plans.load(file)
    assert (plan.name, plan.reference, plan.others) == ("mine", "dual", ["shared", "given"])
    configs = plan.configs(Path("out"))
    assert list(configs)[:4] == [("dual", 0), ("shared", 0), ("given", 0), ("dual", 1)]  # seed by seed
    for (arm, seed), config in configs.items():
        assert config.run.folder == str(Path("out") / arm / f"seed-{seed}")
        assert (config.train.seed, config.train.global_batch, config.data.train) == (seed, 8, "a/set")
        assert config.checkpoint.every_images < config.train.total_images == 640
    assert configs["shared", 1].text.mode == "shared" and plan.label("shared") == "one for both"
    assert configs["given", 0].text.frozen == str(plans.table_of(Path("out")))


def test_the_command_line_goes_before_the_file(file):
    plan = plans.load(file, seeds=4, images=80)
    configs = plan.configs(Path("out"))
    assert len(configs) == 12 and {config.train.total_images for config in configs.values()} == {80}


def test_the_mistakes_of_a_file_are_reported_at_once(file):
    file.write_text(
        """
bas: x
base: base.yaml
seeds: many
reference: twin
decides: [fid, r_precision_own]
protocol: held-out
arms:
  dual: {overrides: [text.mode=dul]}
  sha/red: {lable: x, overrides: [data.image_size=33, data.sizes=2]}
"""
    )
    with pytest.raises(ConfigError) as caught:
        plans.load(file)
    message = str(caught.value)
    for part in (
        "10 problems",
        "bas: unknown key; did you mean base?",
        "seeds: expected a whole number",
        "arms.sha/red: the name becomes a folder name",
        "arms.sha/red.lable: unknown key; did you mean arms.sha/red.label?",
        "reference: twin is not one of the arms",
        "decides: unknown metric 'fid'",
        "decides: r_precision_own comes from the networks of each arm",
        "arms.dual: override 'text.mode=dul'",
        "arms.sha/red: override 'data.sizes=2': data.sizes: unknown key",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "base: missing"),
        ("base: base.yaml", "at least two arms"),
        ("base: nowhere.yaml\narms: {a: , b: }", "nowhere.yaml does not exist"),
        ("base: base.yaml\narms: {a: , b: {overrides: [text.mode=frozen]}}", "frozen needs text.frozen"),
        ("base: base.yaml\noverrides: [train.global_batch=3]\narms: {a: , b: }", "1 problem"),
        ("base: base.yaml\nseeds: 0\narms: {a: , b: }", "seeds: must be at least 1"),
        ("base: base.yaml\nprotocol: coco\narms: {a: , b: }", "protocol: no protocol 'coco'"),
        ("arms: [", "is not YAML"),
        ("- a", "expected `key: value` lines"),
    ],
)
def test_files_that_cannot_be(file, text, message):
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        plans.load(file)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_names_those_that_are(file):
    with pytest.raises(ConfigError, match=r"ablation-mine\.yaml"):
        plans.load(file.with_name("ablation-yours.yaml"))


def test_the_ablations_that_come_along(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "configs").glob("ablation-*.yaml")):
        plan = plans.load(path)
        assert len(plan.configs(Path("out"))) == plan.seeds * len(plan.arms)
        assert plan.seeds >= 3 and all(plan.arms[arm].claim for arm in plan.others)
