"""Golden curves: the metrics of tiny runs, committed as `tests/golden/curve_VARIANT.json`.

Each variant trains for 40 steps on one CPU process in fp32, as a user starts a run. The reported losses and
logits of the first ten steps equal the committed numbers within 1e-4. A change of any loss weight by 2% exceeds this
tolerance. After an intended change of the numbers, a person writes and commits new numbers; no test writes them:

python tests/workflows/test_golden_curve.py --write

Other processors and thread counts compute sums in another order. Round-off alone changes the numbers by about 1e-6. But
sometimes round-off moves an activation across the kink of a leaky ReLU, and a gradient jumps. Therefore the learning
rates are low and rise slowly, and AdamW's epsilon is wide: such a jump hardly moves the first ten steps. Gradient norms
show it at once, so they are not compared. Jumps add up over the other thirty steps, where single values must be finite,
and the means of the two totals are compared loosely.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # pytest finds the helpers by tests/conftest.py, and the package from the project's folder
    sys.path[1:1] = [str(TESTS / "support"), str(TESTS.parent)]

from dist_t2i.config.files import loads  # noqa: E402
from dist_t2i.config.sections import LossConfig  # noqa: E402
from runs import Run, make_set  # noqa: E402

pytestmark = pytest.mark.slow

GOLDEN = TESTS / "golden"
BATCH, STEPS, FIRST = 8, 40, 10

TOLERANCE = 1e-4
"""Of the first steps: relative to the committed number, or to `SMALLEST` where that is larger."""
SMALLEST = 0.1
"""Logits and adversarial losses swing around zero by about 1, where a relative difference has no meaning."""
LATER_TOLERANCE = 0.05
"""Of the means of `TOTALS` over the later steps, relative."""
TOTALS = ("loss/d", "loss/g")

Curve = dict[str, list[Any]]
"""The values of each metric, step by step; None where a step has none, as between two lazy penalties."""

CONFIG = """
data: {image_size: 32, workers: 0, max_tokens: 8}
text: {embedding: 16}
model:
  generator: {noise: 8, condition: 8, channels: [16, 12, 8], layout: 256}
  discriminator: {channels: [8, 12, 16], embedding: 16, regions: [8], region_embedding: 8, words: 0}
loss:
  {mismatched: 0.5, penalty_every: 2, g_alignment_text: 1, g_alignment_image: 1, g_alignment_regions: 1, kl: 0.02,
   g_alignment_words: 1, g_mode_seeking: 0}
optimizer: {generator_lr: 2.0e-4, discriminator_lr: 2.0e-4, warmup_images: 3200, decay: constant, epsilon: 0.1,
            gradient_clipping: 0}
train: {global_batch: 8, seed: 0}
engine: {precision: fp32}
report: {every_steps: 1, sample_every_images: 1000000}
checkpoint: {every_images: 1000000}
"""
"""Of all variants. The rates do not depend on the length of a run, so ten steps alone are the first ten of forty."""

VARIANTS = {
    "dual": (
        "text.mode=dual",
        "loss.pixels=2",
        "loss.kl=1",
        "loss.penalty=r1",
        "loss.penalty_weight=1",
    ),
    "shared": (
        "text.mode=shared",
        "loss.penalty=ma_gp",
        "loss.penalty_weight=0.01",
    ),
    "attn": (
        "model.generator=attn",
        "model.discriminator.words=8",
        "loss.penalty=fd_r1",
        "loss.penalty_weight=1",
        "loss.penalty_sigma=0.5",
    ),
    "varied": ("loss.g_mode_seeking=1",),
    "edit": (
        "edit.width=8",
        "edit.words=1",
        "edit.own=0.4",
        "loss.reconstruction=10",
        "loss.edit_target=5",
    ),
}

SEEN_IN = {
    "loss.mismatched": "dual",
    "loss.pixels": "dual",
    "loss.kl": "dual",
    "loss.penalty_weight": "dual",
    "loss.d_alignment": "dual",
    "loss.d_alignment_regions": "shared",
    "loss.g_alignment_text": "shared",
    "loss.g_alignment_image": "shared",
    "loss.temperature": "shared",
    "loss.g_mode_seeking": "varied",
    "loss.d_alignment_words": "attn",
    "loss.g_alignment_words": "attn",
    "loss.word_temperature": "attn",
    "loss.word_sharpness": "attn",
    "loss.penalty_sigma": "attn",
    "loss.reconstruction": "edit",
    "loss.edit_target": "edit",
    "loss.g_alignment_regions": "edit",
    "loss.region_temperature": "edit",
}
"""The variant that shows a change of a weight (a temperature, a step size) by 2%. Every weight has one."""

NO_WEIGHTS = {"loss.penalty", "loss.penalty_every", "loss.region_negatives", "loss.mismatched_group"}
"""Keys that name a choice or a count, which nothing changes by 2%."""


def paths(section: Any, name: str) -> Iterator[str]:
    """The keys of a section of the configuration, and of those inside it."""
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from paths(value, path)
        else:
            yield path


LOSS_KEYS = tuple(paths(LossConfig(), "loss"))


def run_curve(folder: Path, data: Path, variant: str, *overrides: str, steps: int = STEPS) -> Curve:
    """Trains, and returns the losses and logits of the run's metrics.jsonl."""
    run = Run(folder, data, *VARIANTS[variant], f"train.total_images={steps * BATCH}", *overrides)
    run.config.write_text(CONFIG)
    assert run.train() == 0, run.output()
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    names = sorted({name for line in lines for name in line if name.startswith(("loss/", "logit/"))})
    return {name: [line.get(name) for line in lines] for name in names}


def committed(variant: str) -> Curve:
    return json.loads((GOLDEN / f"curve_{variant}.json").read_text())


def differences(got: Curve, wanted: Curve) -> list[str]:
    """The first steps that differ from the committed numbers, in words; an empty list if none differs."""
    found = [f"{name}: only in one of the two" for name in sorted(got.keys() ^ wanted.keys())]
    for name in sorted(got.keys() & wanted.keys()):
        for step, (new, old) in enumerate(zip(got[name][:FIRST], wanted[name][:FIRST], strict=True), 1):
            if not same(new, old):
                found.append(f"{name}, step {step}: {new}, committed {old}")
    return found


def same(new: float | None, old: float | None) -> bool:
    """Whether two values of a step agree within the tolerance; NaN agrees with nothing."""
    if new is None or old is None:
        return new is old
    return abs(new - old) <= TOLERANCE * max(abs(old), SMALLEST)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_curve_is_the_committed_one(variant, data, tmp_path):
    got, wanted = run_curve(tmp_path / "run", data, variant), committed(variant)
    assert not differences(got, wanted)
    later = {name: values[FIRST:] for name, values in got.items()}
    assert all(math.isfinite(value) for values in later.values() for value in values if value is not None)
    for name in TOTALS:
        mean = statistics.fmean(wanted[name][FIRST:])
        assert statistics.fmean(later[name]) == pytest.approx(mean, rel=LATER_TOLERANCE), name


def test_ten_steps_alone_are_the_first_ten(data, tmp_path):
    """A run of ten steps equals the first ten of 40, so a difference in the last test comes from the weight."""
    assert not differences(run_curve(tmp_path / "run", data, "dual", steps=FIRST), committed("dual"))


def test_every_weight_is_seen_in_a_variant():
    """A new key of section `loss` fails here until it is in `SEEN_IN`, or in `NO_WEIGHTS` with good reason."""
    assert sorted(LOSS_KEYS) == sorted([*SEEN_IN, *NO_WEIGHTS])


@pytest.mark.parametrize("key", [key for key in LOSS_KEYS if key not in NO_WEIGHTS])
def test_a_weight_changed_by_two_percent_is_seen(key, data, tmp_path):
    assert key in SEEN_IN, f"no variant is known to show a change of {key}"
    variant = SEEN_IN[key]
    weight = functools.reduce(getattr, key.split("."), loads(CONFIG, VARIANTS[variant]))
    assert weight != 0, f"{key} is off in {variant}"
    got = run_curve(tmp_path / "run", data, variant, f"{key}={1.02 * weight!r}", steps=FIRST)
    assert differences(got, committed(variant))


def write() -> None:
    """Trains every variant, and overwrites the committed numbers."""
    with tempfile.TemporaryDirectory() as folder:
        data = make_set(Path(folder) / "set")
        for variant in VARIANTS:
            curve = run_curve(Path(folder) / variant, data, variant)
            lines = [f"{json.dumps(name)}: {json.dumps(rounded(values))}" for name, values in curve.items()]
            file = GOLDEN / f"curve_{variant}.json"
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            print(file)


def rounded(values: list[Any]) -> list[Any]:
    return [None if value is None else float(f"{value:.7g}") for value in values]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The committed numbers of the golden curves.")
    parser.add_argument("--write", action="store_true", required=True, help="train, and overwrite them")
    parser.parse_args()
    write()
