"""Configurations: the meaning of a YAML file, the reports of mistakes, and the changes that are allowed on resume."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dist_t2i.config import files
from dist_t2i.config.fields import build, flatten, keys, reference, value_of
from dist_t2i.config.files import dump, load, loads
from dist_t2i.config.resume import differences, refuse_changes, with_earlier_defaults
from dist_t2i.config.sections import RENAMED, Config
from dist_t2i.config.validation import check_world, problems_of
from dist_t2i.errors import ConfigError
from ranks import ROOT

GOLDEN = ROOT / "tests" / "golden"


def problems(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loads(text, overrides)
    return "\n".join(caught.value.problems)


def test_defaults_are_a_configuration_that_passes_its_own_checks():
    assert loads("") == Config()
    assert problems_of(Config()) == []


def test_file_then_overrides(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  image_size: 32\ntrain:\n  global_batch: 128\n  seed: 7\n")
    config = load(file, ["train.global_batch=96", "model.generator.channels=[256, 128]", "engine={generator_stage: 2}"])
    assert (config.data.image_size, config.train.global_batch, config.train.seed) == (32, 96, 7)
    assert config.model.generator.channels == (256, 128)
    assert (config.engine.generator_stage, config.engine.discriminator_stage) == (2, 0)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {generator_lr: 1e-4}", "optimizer.generator_lr", 1e-4),  # a text in YAML 1.1
        ("optimizer: {generator_lr: 1E-4}", "optimizer.generator_lr", 1e-4),
        ("optimizer: {generator_lr: .5}", "optimizer.generator_lr", 0.5),
        ("optimizer: {beta1: 0}", "optimizer.beta1", 0.0),
        ("train: {total_images: 2e6}", "train.total_images", 2_000_000),
        ("train: {total_images: 2_000_000}", "train.total_images", 2_000_000),
        ("train: {seed: 012}", "train.seed", 12),  # ten in YAML 1.1
        ("run: {name: off}", "run.name", "off"),  # false in YAML 1.1
        ("run: {name: 12:30}", "run.name", "12:30"),  # 750 in YAML 1.1
        ("run: {name: 2026-11-24}", "run.name", "2026-11-24"),  # a date in YAML 1.1
        ("data: {flip: false}", "data.flip", False),
        ("model: {generator: {channels: [128, 64]}}", "model.generator.channels", (128, 64)),
        ("data: &d {image_size: 128}\n", "data.image_size", 128),
    ],
)
def test_plain_values_are_read_as_yaml_1_2(text: str, key: str, value: object):
    found = value_of(loads(text), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.name=12", "run.name", "12"),
        ("run.name=a=b", "run.name", "a=b"),
        ("data.train=s3://bucket/a: b", "data.train", "s3://bucket/a: b"),
        ("run.folder=", "run.folder", ""),
        ("model.generator.channels=128,64", "model.generator.channels", (128, 64)),
        ('report.sample_prompts=["a cat, a dog", x]', "report.sample_prompts", ("a cat, a dog", "x")),
        ("optimizer.generator_lr=2e-4", "optimizer.generator_lr", 2e-4),
    ],
)
def test_overrides(override: str, key: str, value: object):
    assert value_of(loads("", [override]), key) == value


def test_every_mistake_is_in_one_report():
    """Messages are compared with a file. After a change, read the text that a failure prints, and save it there."""
    text = (GOLDEN / "config_errors.yaml").read_text()
    overrides = [
        "train.image_size=3",
        "report.wandb",
        "loss.penalty_every=",
        "optimiser.beta1=0",
        "text.embedding={a: 1}",
    ]
    with pytest.raises(ConfigError) as caught:
        loads(text, overrides, origin="config_errors.yaml")
    assert f"{caught.value}\n" == (GOLDEN / "config_errors.txt").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine: {discriminator_stage: 3}", "loss.penalty=fd_r1"),
        ("engine: {discriminator_stage: 3}\nloss: {penalty: ma_gp}", "stage of at most 2"),
        ("text: {mode: frozen}", "text.mode: frozen needs text.frozen"),
        ("text: {frozen: some/folder}", "text.frozen: is only read with text.mode=frozen"),
        ("engine: {offload: cpu, discriminator_stage: 1}", "set engine.generator_stage to 1, 2 or 3"),
        ("data: {image_size: 96}", "must be a power of two, is 96; the nearest is 128"),
        ("data: {image_size: 16}", "data.image_size: must be at least 32"),
        ("data: {image_size: 32}\nmodel: {generator: {channels: [8, 8, 8, 8, 8]}}", "5 scales reach 64 pixels"),
        ("model: {discriminator: {channels: []}}", "needs at least one number"),
        ("model: {discriminator: {channels: [8, 0]}}", "model.discriminator.channels: must be at least 1, is 0"),
        (
            "model: {discriminator: {regions: [8, 12]}}",
            "8, 12 must be among the scales that model.discriminator.channels",
        ),
        ("model: {discriminator: {channels: [8, 8], patches: 16}}", "patches: 16 must be among"),
        ("model: {discriminator: {channels: [8, 8], words: 16, regions: []}}", "words: 16 must be among the scales"),
        (
            "model: {generator: {attn: {heads: 2}}}",
            "model.generator.attn.heads: is only read by the generator attn, but model.generator.kind is plain",
        ),
        (
            "model: {generator: {kind: attn, attn: {scales: [8, 12]}}}",
            "model.generator.attn.scales: 8, 12 must be among the scales that model.generator.channels computes: 4, 8",
        ),
        ("model: {generator: {colors: 1}}", "model.generator.colors: a picture of one color shows nothing"),
        ("model: {generator: {color_sharpness: 2}}", "model.generator.color_sharpness: only applies to a palette"),
        ("model: {generator: {kind: attn, attn: {scales: []}}}", "attn.scales: the list must be among the scales"),
        ("model: {generator: {kind: attn, attn: {heads: 3}}}", "attn.width: must be a multiple of attn.heads=3, is 32"),
        ("model: {generator: {kind: attn, attn: {heads: 0}}}", "attn.width: must be a multiple of attn.heads=0"),
        (
            "model: {generator: {kind: attn, channels: [64, 30]}}",
            "attn.heads: must divide the 30 channels of the map of side 8, is 4",
        ),
        ("model: {generator: {kind: attn, attn: {scale: [8]}}}", "did you mean model.generator.attn.scales?"),
        ("loss: {word_sharpness: 0}", "loss.word_sharpness: must be above 0, is 0"),
        ("text: {embedding: 255}", "must be even"),
        ("text: {encoder: transformer, embedding: 250}", "must be a multiple of text.heads=4, is 250"),
        ("train: {global_batch: 63}", "must be even"),
        ("optimizer: {decay_start: -0.1}", "must be at least 0 and at most 1, is -0.1"),
        ("optimizer: {beta2: 1}", "must be at least 0 and below 1, is 1"),
        ("loss: {temperature: 0}", "must be above 0, is 0"),
        ("optimizer: {generator_lr: .inf}", "expected a number, got the number inf"),
        ("text: {encoder: transformer, heads: 0}", "text.heads: must be at least 1"),
        ("data: {image_size: 0}", "data.image_size: must be at least 32"),
        ("checkpoint: {keep_last: 0}", "must be at least 1, is 0"),
    ],
)
def test_values_that_cannot_work(text: str, expected: str):
    report = problems(text)
    assert expected in report
    assert report.startswith("line ")


@pytest.mark.parametrize(
    "text",
    [
        "engine: {discriminator_stage: 3}\nloss: {penalty: fd_r1}",
        "engine: {discriminator_stage: 3}\nloss: {penalty: none}",
        "engine: {generator_stage: 3, discriminator_stage: 2, offload: cpu}",
        "text: {mode: frozen, frozen: some/folder}",
        "data: {image_size: 512}",
    ],
)
def test_combinations_that_work(text: str):
    assert loads(text) != Config()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("data: {image_sise: 64}", "did you mean data.image_size?"),
        ("train: {image_size: 64}", "did you mean data.image_size?"),  # a valid key in the wrong section
        ("optimiser: {beta1: 0}", "did you mean optimizer?"),
        ("generator: {noise: 3}", "did you mean model.generator"),
        ("data: {zzz: 1}", "data has train, weights"),
    ],
)
def test_unknown_keys_get_the_nearest_match(wrong: str, hint: str):
    assert hint in problems(wrong)


def test_a_section_with_kinds_may_be_given_as_the_kind_alone():
    in_short = loads("model: {generator: plain}")
    assert in_short == loads("model: {generator: {kind: plain}}") == loads("", ["model.generator=plain"])
    kept = loads("model: {generator: {noise: 5}}", ["model.generator=plain"])
    assert (kept.model.generator.kind, kept.model.generator.noise) == ("plain", 5)
    assert loads(dump(in_short)) == in_short
    assert "line 1: model.generator.kind: given twice" in problems("model: {generator: {kind: plain, kind: plain}}")
    assert "discriminator is a section" in problems("model: {discriminator: plain}")


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        ("model:\n  generator: plane\n", (), "line 2"),
        ("model: {generator: {kind: plane}}", (), "line 1"),
        ("", ("model.generator=plane",), "override 'model.generator=plane'"),
    ],
)
def test_an_unknown_kind_gets_the_nearest_match(text: str, overrides: tuple[str, ...], place: str):
    report = problems(text, *overrides)
    assert report.startswith(f"{place}: model.generator.kind: expected one of plain")
    assert report.endswith("got the text 'plane'; did you mean plain?")
    assert "got the number 3" in problems("model: {generator: 3}")


def test_a_merge_key_may_be_overridden_but_a_repeated_key_is_a_mistake():
    text = "data: &base {image_size: 128, workers: 3}\n"
    assert loads(text + "text: {}").data.workers == 3
    merged = "loss: &l {kl: 0.5}\naugment: {}\n"
    assert loads(merged).loss.kl == 0.5
    assert "line 3: loss.kl: given twice (first on line 2)" in problems("loss:\n  kl: 1\n  kl: 2\n")


@pytest.mark.parametrize(
    "text", ["data: [", "data:\n\timage_size: 3", "a: b: c", "run: {name: !!python/object/apply:os.system [ls]}"]
)
def test_what_is_no_yaml_is_reported_in_a_line(text: str):
    with pytest.raises(ConfigError) as caught:
        loads(text, origin="x.yaml")
    assert "x.yaml" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "openmoji64.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean .*openmoji64\.yaml"):
        load(tmp_path / "openmoji46.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}")
    with pytest.raises(ConfigError, match=r"cannot read .*latin\.yaml"):
        load(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _values(type_: object) -> st.SearchStrategy:
    simple = {
        int: st.integers(0, 2**40),
        float: st.floats(0, 1e9, allow_nan=False),
        bool: st.booleans(),
        str: st.one_of(
            st.text(st.characters(codec="utf-8"), max_size=20),
            st.sampled_from(["off", "1e-4", "012", "~", "yes", "1:30", " x", "#"]),
        ),
    }
    if type_ in simple:
        return simple[type_]
    arguments = type_.__args__
    if isinstance(type_, types.UnionType):
        return st.one_of(*map(_values, arguments))
    if type_.__origin__ is tuple:
        return st.lists(_values(arguments[0]), max_size=3).map(tuple)
    return st.sampled_from(arguments)


@settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.fixed_dictionaries({}, optional={key.name: _values(key.type) for key in keys().values()}))
def test_what_is_dumped_is_read_back_as_the_same(values: dict):
    """For any values, even if their combination is not valid."""
    config = build(values)
    text = dump(config)
    try:
        assert loads(text) == config
    except ConfigError as error:
        readable = [line for line in error.problems if "expected" in line or "unknown" in line or "section" in line]
        assert not readable, text


def test_dump_names_every_key_and_other_readers_agree():
    plain = yaml.safe_load(dump(Config()))
    assert set(plain) == {field.name for field in dataclasses.fields(Config)}
    assert plain["model"]["generator"]["channels"] == list(Config().model.generator.channels)
    assert plain["optimizer"]["generator_lr"] == Config().optimizer.generator_lr


# ---- documentation ---------------------------------------------------------------------------------------------------


def test_every_key_is_documented():
    undocumented = [key.name for key in keys().values() if len(key.doc) < 10]
    assert undocumented == []


def test_the_reference_lists_every_key_with_its_default():
    text = reference()
    for key in keys().values():
        assert f"  {key.name.rpartition('.')[2]}: " in text
    assert "global_batch: 16    (a whole number)" in text


def test_the_reference_needs_no_torch():
    code = "import sys; from dist_t2i.config.fields import reference; reference(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- world size and resume -------------------------------------------------------------------------------------------


def test_the_global_batch_is_cut_into_even_micro_batches():
    config = loads("train: {global_batch: 64}\nengine: {accumulation: 2}")
    assert [check_world(config, world) for world in (1, 2, 4, 8, 16)] == [32, 16, 8, 4, 2]
    with pytest.raises(
        ConfigError, match=r"64 images over 32 ranks x engine.accumulation=2 give 1 images per micro-batch"
    ):
        check_world(config, 32)
    with pytest.raises(ConfigError, match="use 60 or 72, another accumulation, or another number of ranks"):
        check_world(config, 3)
    with pytest.raises(ConfigError, match="use 4, another"):
        check_world(loads("train: {global_batch: 2}"), 2)


def test_only_what_leaves_the_result_alone_may_change_on_resume():
    old = loads("")
    free = ["run.folder=x", "report.every_steps=1", "checkpoint.keep_last=9", "data.workers=0", "data.train=elsewhere"]
    free += ["engine.accumulation=2", "engine.generator_stage=2", "engine.discriminator_stage=1", "engine.offload=cpu"]
    assert differences(old, loads("", free)) == {}
    assert len(differences(old, loads("", free), free=True)) == len(free)
    binding = ["train.seed=1", "train.global_batch=32", "optimizer.beta2=0.9", "engine.precision=bf16", "data.crop=0.5"]
    new = loads("", binding)
    assert list(differences(old, new)) == [
        "data.crop",
        "optimizer.beta2",
        "engine.precision",
        "train.global_batch",
        "train.seed",
    ]
    with pytest.raises(ConfigError) as caught:
        refuse_changes(old, new)
    assert "train.seed: was 0, is now 1" in str(caught.value)
    assert "--allow-changes" in str(caught.value)
    assert len(refuse_changes(old, new, allow=True)) == 5
    other = [
        "model.generator.condition=64",
        "optimizer.generator_matrices=muon",
        "model.generator.truncation=0.5",
        "model.generator.colors=8",
        "model.generator.color_sharpness=1.5",
        "loss.kl=0.5",
    ]
    with pytest.raises(ConfigError) as caught:
        refuse_changes(old, loads("", other), allow=True)
    assert len(caught.value.problems) == 3 and "do not fit another network or optimizer" in str(caught.value)


def test_a_run_may_be_prolonged_where_no_schedule_depends_on_its_length():
    longer = ["train.total_images=9_000_000"]
    assert "train.total_images" in differences(loads(""), loads("", longer))
    constant = "optimizer: {decay: constant}"
    assert differences(loads(constant), loads(constant, longer)) == {}


def test_flatten_and_build_are_inverse():
    config = loads("train: {seed: 3}\nmodel: {generator: {channels: [8, 8]}}")
    assert build(flatten(config)) == config


# ---- names of earlier versions ---------------------------------------------------------------------------------------


@pytest.fixture
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(files, "_WARNED", set())
    monkeypatch.delenv("RANK", raising=False)


OLD_NAMES = "model:\n  generator:\n    colours: 4\n    colour_sharpness: 1.5\n"
NEW_NAMES = "model: {generator: {colors: 4, color_sharpness: 1.5}}"


def test_keys_of_earlier_versions_are_read_with_one_warning_each(fresh_warnings, capsys):
    assert loads(OLD_NAMES, origin="old.yaml") == loads(NEW_NAMES)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "warning: old.yaml: line 3: model.generator.colours has a new name, model.generator.colors",
        "warning: old.yaml: line 4: model.generator.colour_sharpness has a new name, model.generator.color_sharpness",
    ]
    overrides = ["model.generator.colours=4", "model={generator: {colour_sharpness: 1.5}}"]
    assert loads("", overrides) == loads("model: {generator: &g {colours: 4, colour_sharpness: 1.5}}")
    assert loads("", overrides) == loads(NEW_NAMES)
    assert capsys.readouterr().err == "", "a process warns once"
    assert "colour" not in dump(loads(OLD_NAMES))


def test_only_rank_0_warns_of_old_names(fresh_warnings, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    loads(OLD_NAMES)
    assert capsys.readouterr().err == ""


def test_an_old_name_is_no_second_key(fresh_warnings):
    twice = "model: {generator: {colors: 4, colours: 5}}"
    assert problems(twice) == "line 1: model.generator.colours: given twice (first on line 1)"
    assert loads(OLD_NAMES, ["model.generator.colors=7"]).model.generator.colors == 7
    assert "line 3: model.generator.colors: expected a whole number" in problems(OLD_NAMES.replace("4", "many"))


def test_renamed_keys_are_keys_of_the_same_section():
    for old, new in RENAMED.items():
        assert new in keys() and old not in keys()
        assert old.rpartition(".")[0] == new.rpartition(".")[0]


def test_a_recorded_file_keeps_what_its_version_did():
    """A key that was added later, with an active default, is off in files that `dump` wrote before it existed."""
    added = {name: key for name, key in keys().items() if key.absent is not None}
    assert "loss.g_mode_seeking" in added
    for name, key in added.items():
        leaf = name.rpartition(".")[2]
        recorded = "".join(line for line in dump(Config()).splitlines(True) if line.split(":")[0].strip() != leaf)
        assert value_of(loads(recorded), name) == key.absent
        assert value_of(loads(recorded, [f"{name}={key.default}"]), name) == key.default
        assert value_of(loads("data: {image_size: 32}"), name) == key.default
    old = load(ROOT / "tests" / "fixtures" / "e144595" / "run" / "config.yaml")
    assert old.loss.g_mode_seeking == 0 and old.loss.mismatched_group == 2


def test_a_run_of_an_earlier_version_keeps_its_defaults_unless_others_are_given():
    old = build({"data.image_size": 32, "loss.kl": 0.02, "loss.g_mode_seeking": 0.0, "model.discriminator.words": 0})
    same = loads("data: {image_size: 32}")
    assert not differences(old, with_earlier_defaults(old, same))
    other = loads("{data: {image_size: 32}, loss: {kl: 0.1}}")
    assert differences(old, with_earlier_defaults(old, other)) == {"loss.kl": (0.02, 0.1)}
    started = build({"data.image_size": 32, "loss.kl": 0.3})  # not a default of any version
    assert differences(started, with_earlier_defaults(started, same)) == {"loss.kl": (0.3, 0.005)}
