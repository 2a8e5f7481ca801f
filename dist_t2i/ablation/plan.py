"""The file of an ablation (configs/ablation-*.yaml): which arms, on what, how long, how often, judged how."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dist_t2i.config import files as config_files
from dist_t2i.config.files import read_section
from dist_t2i.config.sections import Config
from dist_t2i.errors import ConfigError

SOURCES = ("", "openmoji")


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    label: str = ""
    """How tables call it; empty: its name."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` on top of the plan's, as on the command line of train.py."""
    sentences: bool = False
    """Whether `text.frozen` is a table of this set's captions, written with the sentence encoder of a package."""
    claim: str = ""
    """What is said of this arm: `REFERENCE does better than it` is put to the test."""
    note: str = ""
    """What a reader must know to judge the comparison."""


@dataclass(frozen=True)
class Plan:
    """An ablation."""

    name: str = ""
    base: str = ""
    """Configuration that all arms share, relative to the folder where the command runs."""
    data: str = ""
    """The set; empty: the base configuration's data.train."""
    source: str = ""
    """`openmoji`: a set that is not there yet is made with `tools/shard.py openmoji`."""
    images: int = 0
    """Budget of each run in images seen; 0: the base configuration's."""
    seeds: int = 3
    """Runs of each arm: seeds train.seed, train.seed + 1, ..."""
    overrides: tuple[str, ...] = ()
    """Of every arm."""
    reference: str = ""
    """The arm that the others are compared with; empty: the first."""
    decides: tuple[str, ...] = ("kid", "recall_at_1")
    """Metrics that the verdict is about, on the first split; the others are reported."""
    prompts: int = 10
    """Rows of the sample grid."""
    protocol: str = "held-out"
    """By which runs are scored: its name, or a .yaml file."""
    arms: dict[str, Arm] = field(default_factory=dict)

    def label(self, arm: str) -> str:
        return self.arms[arm].label or arm

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the reference."""
        return [name for name in self.arms if name != self.reference]

    def config(self, arm: str, number: int, out: Path) -> Config:
        """The configuration of one run: seed number `number` of an arm. Raises ConfigError."""
        config = self._load(arm, out)
        seed = config.train.seed + number
        folder = str(run_folder(out, arm, seed))
        return dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, folder=folder),
            train=dataclasses.replace(config.train, seed=seed),
        )

    def configs(self, out: Path) -> dict[tuple[str, int], Config]:
        """(arm, seed) -> configuration of every run, seed by seed: stopped early, arms can be compared all the same.

        Raises ConfigError that names every problem of every arm.
        """
        problems: list[str] = []
        found: dict[tuple[str, int], Config] = {}
        for number in range(self.seeds):
            for arm in self.arms:
                try:
                    config = self.config(arm, number, out)
                    found[arm, config.train.seed] = config
                except ConfigError as error:
                    said = error.problems or str(error).splitlines()
                    problems += [f"arms.{arm}: {line}" for line in said]
            if problems:
                break
        if problems:
            raise _error(self.name, _said_once(problems, len(self.arms)))
        return found

    def _load(self, arm: str, out: Path) -> Config:
        given = [f"data.train={self.data}"] if self.data else []
        given += [f"train.total_images={self.images}"] if self.images else []
        table = [f"text.frozen={table_of(out)}"] if self.arms[arm].sentences else []
        config = config_files.load(self.base, [*given, *self.overrides, *self.arms[arm].overrides, *table])
        if any("checkpoint.every_images" in text for text in self.overrides):
            return config
        # Few enough not to cost, often enough that an interruption loses little; what is drawn comes at the end.
        total = config.train.total_images
        kept = dataclasses.replace(config.checkpoint, every_images=-(-total // 5), keep_last=1)
        return dataclasses.replace(
            config, checkpoint=kept, report=dataclasses.replace(config.report, sample_every_images=total)
        )


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run lives: as `tools/submit.py --array-seeds` lays them out."""
    return out / arm / f"seed-{seed}"


def table_of(out: Path) -> Path:
    """The table of caption vectors of the arms with `sentences`."""
    return out / "sentences.safetensors"


def load(path: Path, *, seeds: int | None = None, images: int | None = None) -> Plan:
    """The checked plan of a file; `seeds` and `images` go before what it says.

    Raises ConfigError with every problem of the file at once, those of the arms' configurations included.
    """
    try:
        found = config_files.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(str(near) for near in path.parent.glob("ablation*.yaml"))) or "none"
        raise ConfigError(f"no ablation {path}; in that folder there are: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the ablation {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the ablation {path} is not YAML: {' '.join(str(error).split())}") from None
    problems: list[str] = []
    plan: Plan = read_section({} if found is None else found, Plan, "", problems, "an ablation")
    plan = dataclasses.replace(
        plan,
        name=plan.name or path.stem.removeprefix("ablation-"),
        reference=plan.reference or next(iter(plan.arms), ""),
        seeds=plan.seeds if seeds is None else seeds,
        images=plan.images if images is None else images,
    )
    problems += _contradictions(plan)
    if plan.base and plan.arms and not any(line.startswith("base:") for line in problems):
        try:
            plan.configs(Path("runs"))
        except ConfigError as error:
            problems += error.problems or [str(error)]
    if problems:
        raise _error(str(path), problems)
    return plan


def _contradictions(plan: Plan) -> list[str]:
    from dist_t2i.ablation import scoring  # it brings torch along

    problems = []
    if not plan.base:
        problems.append("base: missing: the configuration file that the arms share, such as configs/openmoji32.yaml")
    elif not Path(plan.base).is_file():
        problems.append(f"base: there is no {plan.base} (looked for from {Path.cwd()})")
    if len(plan.arms) < 2:
        problems.append(f"arms: a comparison needs at least two, has {len(plan.arms)}")
    for name in plan.arms:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            problems.append(f"arms.{name}: becomes a folder: use letters, digits, - and _")
        elif name in ("features", "report"):
            problems.append(f"arms.{name}: is the name of a folder of the ablation itself: choose another")
    if plan.arms and plan.reference not in plan.arms:
        problems.append(f"reference: {plan.reference} is none of the arms {', '.join(plan.arms)}")
    if plan.seeds < 1:
        problems.append(f"seeds: at least 1 (and 3 for an interval that says something), is {plan.seeds}")
    if plan.images < 0:
        problems.append(f"images: at least 1, is {plan.images}")
    if plan.source not in SOURCES:
        problems.append(f"source: openmoji or nothing, is {plan.source}")
    return problems + scoring.problems_of(plan.protocol, plan.decides)


def _said_once(problems: list[str], arms: int) -> list[str]:
    """Problems that every arm has are the base's, and told once."""
    texts = [line.split(": ", 1)[1] for line in problems]
    found = [text for text in dict.fromkeys(texts) if texts.count(text) == arms]
    return found + [line for line, text in zip(problems, texts, strict=True) if text not in found]


def _error(source: str, problems: list[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in problems), problems)
