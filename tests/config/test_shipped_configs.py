"""The project's configurations load, and the networks have the documented sizes."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from dist_t2i.ablation import plan as plans
from dist_t2i.config.files import load
from dist_t2i.config.sections import Config
from models_on_disk import networks_of
from ranks import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if not path.name.startswith("ablation-")]  # ablations are lists of runs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds(path):
    config = load(path, ["data.train=somewhere"])
    networks = networks_of(config, 500)
    assert networks.generator.generator.noise_width == config.model.generator.noise


def test_the_peer_has_the_peers_size():
    config = load(ROOT / "configs" / "bench-peer64.yaml", ["data.train=somewhere"])
    networks = networks_of(config, 500)

    def millions(module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert config.data.image_size == 64 and config.train.global_batch == 32
    assert millions(networks.generator.generator) == pytest.approx(4.9, abs=0.05)
    assert millions(networks.discriminator.discriminator) == pytest.approx(3.5, abs=0.05)


# ---- README's table of losses ------------------------------------------------------------------------------------------


def losses_of(config) -> dict[str, bool]:
    """Key in section `loss` -> whether the loss is on: its weight is not 0, and the networks have what it needs."""
    loss, d = config.loss, config.model.discriminator
    on = {field.name: bool(getattr(loss, field.name)) for field in dataclasses.fields(loss)}
    on["penalty"] = loss.penalty != "none" and loss.penalty_weight > 0
    for key, needed in {"regions": d.regions, "words": d.words}.items():
        on |= {name: on[name] and bool(needed) for name in (f"d_alignment_{key}", f"g_alignment_{key}")}
    return on | {key: on[key] and config.edit.width > 0 for key in ("reconstruction", "edit_target")}


def table_of_losses() -> dict[str, dict[str, bool]]:
    """Column -> key -> whether README's table says `on`."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| loss | key |"))
    head = [cell.strip() for cell in lines[start].strip("|").split("|")]
    columns: dict[str, dict[str, bool]] = {column: {} for column in head[3:]}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for column, cell in zip(head[3:], cells[3:], strict=True):
            assert cell in ("on", "off"), line
            if key := cells[1].strip("`"):
                columns[column][key] = cell == "on"
    return columns


def column_of(name: str) -> str:
    if name.startswith("edit-"):
        return "edits"
    return "OpenMoji" if "openmoji" in name or name == "bench-peer64" else "default"


def configurations() -> list[tuple[str, Config, set[str]]]:
    """Name, configuration, and the keys in which it may differ from its column, because its file explains why."""
    found = [
        (path.stem, load(path, ["data.train=somewhere"]), {"pixels"} if path.stem == "bench-peer64" else set[str]())
        for path in CONFIGS
    ]
    for path in FILES:
        if path.name.startswith("ablation-"):
            plan = plans.load(path)
            off = {text.partition("=")[0].removeprefix("loss.") for text in plan.overrides if text.endswith("=0")}
            found.append((path.stem, plan.config(plan.reference, 0, Path("runs")), off))
    return [*found, ("default", Config(), set())]


@pytest.mark.parametrize(("name", "config", "differs"), configurations(), ids=[name for name, *_ in configurations()])
def test_the_table_of_losses_is_right_for_every_configuration(name, config, differs):
    expected, found = table_of_losses()[column_of(name)], losses_of(config)
    assert {key: found[key] for key in expected} == {
        key: False if key in differs else on for key, on in expected.items()
    }


def test_the_table_of_losses_names_every_weight():
    others = {"mismatched_group", "penalty_weight", "penalty_every", "penalty_sigma", "region_negatives"}
    named = {key for key in losses_of(Config()) if "temperature" not in key and "sharpness" not in key} - others
    for column in table_of_losses().values():
        assert set(column) == named
