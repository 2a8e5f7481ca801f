"""Checks of a run's health: a number that is not finite ends the run; a collapse causes a warning with a remedy.

Both checks of this module read the averages that `Meter.take` returns. These averages are the same on every rank, so
all ranks reach the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dist_t2i.errors import TrainingError

Values = Mapping[str, float]
_OWNERS = {
    **dict.fromkeys(("loss/d", "grad/discriminator"), "discriminator and its text encoder"),
    **dict.fromkeys(("loss/g", "loss/kl", "grad/generator"), "generator and its text encoder"),
    "grad/text": "shared text encoder",
    "logit/": "discriminator",
    "fake/": "generator",
}
"""Prefix of a metric's name -> the networks that an error message names if the metric is not finite."""


def check_finite(
    values: Values, images: int, step: int, checkpoint: str = "", groups: Sequence[str] = (), fp16: bool = False
) -> None:
    """Raise TrainingError if a loss, logit or gradient norm is NaN or Inf.

    `checkpoint` is the folder of the last good checkpoint. `groups` are the names of the parameter groups that hold a
    NaN or Inf. With `fp16`, gradient norms are not checked, because loss scaling skips steps whose gradients overflow.
    """
    checked = [name for name in sorted(values) if _owner(name) and not (fp16 and name.startswith("grad/"))]
    bad = [name for name in checked if not math.isfinite(values[name])]
    if not bad:
        return
    listed = ", ".join(f"{name} is {'NaN' if math.isnan(values[name]) else 'infinite'}" for name in bad)
    trained = ", ".join(groups) or "; ".join(dict.fromkeys(map(_owner, bad)))
    last = f"The last good checkpoint is intact: {checkpoint}" if checkpoint else "There is no checkpoint yet"
    raise TrainingError(
        f"training broke down at {images:,} images (step {step:,}): {listed}\n"
        f"  parameter groups: {trained}\n"
        f"  {last}.\n"
        "  The same command would fail again. Lower optimizer.generator_lr and discriminator_lr, or set\n"
        "  optimizer.gradient_clipping=1 or engine.precision=fp32. Then start a new run, or resume from the\n"
        "  checkpoint with --allow-changes."
    )


def _owner(name: str) -> str:
    return next((owner for start, owner in _OWNERS.items() if name.startswith(start)), "")


@dataclass(frozen=True)
class _Sign:
    holds: Callable[[Values], bool]
    patience: float  # share of `Health.patience_images` for which the sign must hold without interruption
    message: str


_SIGNS = {
    "d_zero": _Sign(
        lambda v: v.get("loss/d_adversarial", 1.0) < 0.02,
        1.0,
        "the discriminator's adversarial loss is zero: the discriminator separates real from fake without error, so "
        "the generator learns nothing. Try a larger loss.penalty_weight, a lower optimizer.discriminator_lr, or "
        "augment.*",
    ),
    "identical": _Sign(
        lambda v: v.get("fake/std", 1.0) < 0.02,
        0.25,
        "the generator makes the same picture for every prompt and noise (mode collapse). Return to an earlier "
        "checkpoint with a lower optimizer.generator_lr, or raise loss.penalty_weight and loss.g_alignment_text",
    ),
    "logits": _Sign(
        lambda v: max(abs(v.get("logit/real", 0.0)), abs(v.get("logit/fake", 0.0))) > 100,
        0.0,
        "the discriminator's logits grow beyond 100 and may overflow. Try a larger loss.penalty_weight or a lower "
        "optimizer.discriminator_lr",
    ),
}


@dataclass
class Health:
    """Warns once about each sign of collapse. Checkpoints omit this object, because only warnings depend on it."""

    patience_images: int = 20_000  # images for which a sign must hold before the warning
    _since: dict[str, int] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def observe(self, images: int, values: Values) -> list[str]:
        """Warnings that are due at `images`, given the averages of the last report."""
        due = []
        for name, sign in _SIGNS.items():
            if not sign.holds(values):
                self._since.pop(name, None)
                continue
            start = self._since.setdefault(name, images)
            if name not in self._warned and images - start >= sign.patience * self.patience_images:
                self._warned.add(name)
                due.append(f"at {images:,} images {sign.message}")
        return due
