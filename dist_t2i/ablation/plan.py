"""The plan of an ablation, read from configs/ablation-*.yaml: arms, data, budget, seeds, protocol."""

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

SOURCES = ("", "openmoji", "scenes")


@dataclass(frozen=True)
class Arm:
    """One configuration of the several that an ablation compares."""

    label: str = ""
    """Name in tables (default: the arm's key)."""
    overrides: tuple[str, ...] = ()
    """Overrides `section.key=value` of this arm, applied after the plan's overrides."""
    sentences: bool = False
    """Whether the arm sets `text.frozen` to a table of its captions' sentence vectors (see sentence_encoder.py)."""
    claim: str = ""
    """Hypothesis in words, which the scores support if the reference scores better than this arm."""
    note: str = ""
    """Remark on the comparison of this arm with the reference, for readers of the report."""


@dataclass(frozen=True)
class Plan:
    """The plan of one ablation."""

    name: str = ""
    base: str = ""
    """Configuration file that all arms share, relative to the working directory."""
    data: str = ""
    """Sharded set (default: data.train of the base configuration)."""
    source: str = ""
    """With `openmoji` or `scenes`, tools/shard.py writes this set if it does not exist. By default, the set must exist."""
    images: int = 0
    """Images that each run sees (0: train.total_images of the base configuration)."""
    seeds: int = 3
    """Number of runs of each arm, with the seeds train.seed, train.seed + 1, ..."""
    overrides: tuple[str, ...] = ()
    """Overrides `section.key=value` that apply to every arm."""
    reference: str = ""
    """Arm with which the other arms are compared (default: the first arm)."""
    decides: tuple[str, ...] = ("kid", "recall_at_1")
    """Metrics that decide the verdict, on the first split. The report lists the other metrics without a verdict."""
    prompts: int = 10
    """Rows of the sample grid."""
    protocol: str = "held-out"
    """Evaluation protocol: a name, or a .yaml file."""
    arms: dict[str, Arm] = field(default_factory=dict)

    def label(self, arm: str) -> str:
        return self.arms[arm].label or arm

    @property
    def others(self) -> list[str]:
        """All arms except the reference."""
        return [name for name in self.arms if name != self.reference]

    def config(self, arm: str, number: int, out: Path) -> Config:
        """Configuration of one run of an arm, with the seed train.seed + `number`. Raises ConfigError."""
        config = self._load(arm, out)
        seed = config.train.seed + number
        folder = str(run_folder(out, arm, seed))
        return dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, folder=folder),
            train=dataclasses.replace(config.train, seed=seed),
        )

    def configs(self, out: Path) -> dict[tuple[str, int], Config]:
        """(arm, seed) -> configuration of every run. Raises ConfigError with every problem of every arm.

        Runs are ordered by seed, so that an ablation that stops early has runs of all arms.
        """
        problems: list[str] = []
        configs: dict[tuple[str, int], Config] = {}
        for number in range(self.seeds):
            for arm in self.arms:
                try:
                    config = self.config(arm, number, out)
                    configs[arm, config.train.seed] = config
                except ConfigError as error:
                    problems += [f"arms.{arm}: {line}" for line in error.problems or str(error).splitlines()]
            if problems:
                break
        if problems:
            raise _error(self.name, _without_repeats(problems, len(self.arms)))
        return configs

    def _load(self, arm: str, out: Path) -> Config:
        common = [f"data.train={self.data}"] if self.data else []
        common += [f"train.total_images={self.images}"] if self.images else []
        table = [f"text.frozen={table_of(out)}"] if self.arms[arm].sentences else []
        config = config_files.load(self.base, [*common, *self.overrides, *self.arms[arm].overrides, *table])
        if any("checkpoint.every_images" in text for text in self.overrides):
            return config
        # Five checkpoints per run cost little, and an interruption then loses at most a fifth of a run.
        total = config.train.total_images
        checkpoint = dataclasses.replace(config.checkpoint, every_images=-(-total // 5), keep_last=1)
        return dataclasses.replace(
            config, checkpoint=checkpoint, report=dataclasses.replace(config.report, sample_every_images=total)
        )


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Folder of a run, in the layout of `tools/submit.py --array-seeds`."""
    return out / arm / f"seed-{seed}"


def table_of(out: Path) -> Path:
    """Table of caption vectors for arms with `sentences`."""
    return out / "sentences.safetensors"


def load(path: Path, *, seeds: int | None = None, images: int | None = None) -> Plan:
    """The validated plan of a file; `seeds` and `images` override the values in the file.

    Raises ConfigError with all problems at once, including those of the arms' configurations.
    """
    try:
        content = config_files.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(str(near) for near in path.parent.glob("ablation*.yaml"))) or "none"
        raise ConfigError(f"{path} does not exist; ablations in this folder: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the ablation {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the ablation {path} is not YAML: {' '.join(str(error).split())}") from None
    problems: list[str] = []
    plan: Plan = read_section({} if content is None else content, Plan, "", problems, "an ablation")
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
    from dist_t2i.ablation import scoring  # imported here, because this module imports torch

    problems = []
    if not plan.base:
        problems.append("base: missing; name the configuration that all arms share, such as configs/openmoji32.yaml")
    elif not Path(plan.base).is_file():
        problems.append(f"base: {plan.base} does not exist (working directory: {Path.cwd()})")
    if len(plan.arms) < 2:
        problems.append(f"arms: a comparison needs at least two arms, but this file has {len(plan.arms)}")
    for name in plan.arms:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            problems.append(f"arms.{name}: the name becomes a folder name, so use only letters, digits, - and _")
        elif name in ("features", "report"):
            problems.append(f"arms.{name}: an ablation has another folder of this name; choose another name")
    if plan.arms and plan.reference not in plan.arms:
        problems.append(f"reference: {plan.reference} is not one of the arms {', '.join(plan.arms)}")
    if plan.seeds < 1:
        problems.append(f"seeds: must be at least 1 (at least 3 for a useful interval), but is {plan.seeds}")
    if plan.images < 0:
        problems.append(f"images: must be at least 1, but is {plan.images}")
    if plan.source not in SOURCES:
        problems.append(f"source: must be openmoji, scenes or empty, but is {plan.source}")
    return problems + scoring.problems_of(plan.protocol, plan.decides)


def _without_repeats(problems: list[str], arms: int) -> list[str]:
    """The problems, in which a problem of every arm (from the base configuration) appears only once."""
    texts = [line.split(": ", 1)[1] for line in problems]
    shared = [text for text in dict.fromkeys(texts) if texts.count(text) == arms]
    return shared + [line for line, text in zip(problems, texts, strict=True) if text not in shared]


def _error(source: str, problems: list[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in problems), problems)
