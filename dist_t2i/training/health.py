"""Checks of a run's health: numbers that are not finite, signs of divergence, and signs that only deserve a warning.

Every `WINDOW` steps, the averages over these steps are compared with the healthy range. The range is relative to the
real pictures of the same steps and to the run's own history, so that line art, dark pictures, white backgrounds and
small sets raise no alarm. A sign has consequences only after it has held for a while.

The averages are the same on every rank, and checkpoints save the state of these checks. So the images seen when a sign
is found depend only on the configuration and the seed, however often the run was stopped and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dist_t2i.errors import TrainingError
from dist_t2i.reporting.meter import Meter
from dist_t2i.training.schedule import passes

Values = Mapping[str, float]
WINDOW = 8
"""Steps between two checks; a sign is judged by averages over these steps."""
LEAST_WINDOWS = 4
"""Checks for which a sign must hold at least: spikes of GAN training last a few steps."""
WARNING_PATIENCE = 20_000
"""Images for which a sign must hold that only leads to a warning."""

LOGITS, NORMS = 100.0, 1_000.0
"""Mean logits and gradient norms (or losses) below these values are healthy, whatever the history of the run. The hinge
losses have their margin at 1, and gradient norms of healthy runs were between .1 and 300."""
LOGITS_TIMES, NORMS_TIMES = 10.0, 30.0
"""The same, relative to the usual value in this run."""
COLLAPSED = 0.05
"""Healthy fakes differ from each other at least by this share of the difference between real pictures."""
SATURATED = 0.05
"""Healthy fakes keep at least this share of the real pictures' mean distance from black and white."""
SPREAD_OF_SET, ROOM_OF_SET = 0.02, 0.1
"""Real pictures that differ less, or are closer to black and white, say nothing about the fakes."""
NOISE_IGNORED = 0.1
"""Below this `fake/diversity`, the fakes of a caption hardly depend on the noise."""
_HISTORY = 512
"""The usual value follows slow changes over about this many checks."""

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
    NaN or Inf. With `fp16`, gradient norms are not checked: loss scaling skips steps whose gradients overflow.
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


class Usual:
    """The usual magnitude of each metric in this run: a mean of logarithms that a few extreme values hardly move.

    Magnitudes below 1 count as 1, because losses and logits near zero have no scale.
    """

    def __init__(self, means: Mapping[str, tuple[float, int]]) -> None:
        self.means = {name: (float(mean), int(count)) for name, (mean, count) in means.items()}

    def __getitem__(self, name: str) -> float:
        return math.exp(self.means[name][0]) if name in self.means else 1.0

    def text(self, name: str) -> str:
        """The usual magnitude for people."""
        return f"{self[name]:,.2g}" if name in self.means else "not known yet"

    def add(self, name: str, value: float) -> None:
        """Count a healthy value. It moves the mean as if it were at most twice, and at least half, the usual one."""
        logarithm = math.log(max(1.0, abs(value)))
        mean, count = self.means.get(name, (logarithm, 0))
        count = min(count + 1, _HISTORY)
        self.means[name] = mean + min(math.log(2), max(-math.log(2), logarithm - mean)) / count, count


@dataclass(frozen=True)
class Sign:
    """Something that healthy runs do not show for long."""

    find: Callable[[Values, Usual], str]
    """Says which values are out of which range; "" where all are healthy."""
    remedies: Sequence[str]
    fatal: bool = True
    """Whether training has diverged once the sign has held for a while; otherwise the run prints a warning."""


def _exploded(names: Sequence[str], least: float, times: float) -> Callable[[Values, Usual], str]:
    def find(values: Values, usual: Usual) -> str:
        limits = {name: max(least, times * usual[name]) for name in names if name in values}
        return ", ".join(
            f"{name} is {values[name]:,.3g} (healthy: at most {limit:,.0f}; usual in this run: {usual.text(name)})"
            for name, limit in limits.items()
            if math.isfinite(values[name]) and abs(values[name]) > limit
        )

    return find


def _collapsed(values: Values, usual: Usual) -> str:
    fake, real = values.get("fake/std", math.nan), values.get("real/std", math.nan)
    if not (real > SPREAD_OF_SET and fake < COLLAPSED * real):
        return ""
    return f"fake/std is {fake:.2g} (healthy: at least {COLLAPSED:g} of real/std, which is {real:.2g}): fakes are all alike"


def _saturated(values: Values, usual: Usual) -> str:
    fake, real = (1 - values.get(name, math.nan) for name in ("fake/magnitude", "real/magnitude"))
    if not (real > ROOM_OF_SET and fake < SATURATED * real):
        return ""
    limit = 1 - SATURATED * real
    return f"fake/magnitude is {1 - fake:.4f} (healthy: at most {limit:.4f}; real/magnitude is {1 - real:.2f}): fakes are black and white"


def _below(name: str, limit: float, meaning: str) -> Callable[[Values, Usual], str]:
    def find(values: Values, usual: Usual) -> str:
        return f"{name} is {values[name]:.2g}: {meaning}" if values.get(name, math.inf) < limit else ""

    return find


RATES = "lower optimizer.discriminator_lr and optimizer.generator_lr"
_PENALTY = "raise loss.penalty_weight (with a loss.penalty other than none)"
EXPLODING = {
    "logits": (("logit/real", "logit/fake", "logit/mismatched"), LOGITS, LOGITS_TIMES),
    "losses": (("loss/d", "loss/g"), NORMS, NORMS_TIMES),
    "gradients": (("grad/discriminator", "grad/generator", "grad/text"), NORMS, NORMS_TIMES),
}
"""Metrics, the largest healthy magnitude, and the same relative to the usual magnitude; the larger limit counts."""
SIGNS = {
    **{
        name: Sign(_exploded(*s), (RATES, _PENALTY, "set optimizer.gradient_clipping=1"))
        for name, s in EXPLODING.items()
    },
    "collapsed": Sign(_collapsed, (RATES, _PENALTY, "raise loss.g_alignment_text")),
    "saturated": Sign(_saturated, (RATES, _PENALTY)),
    "d_zero": Sign(
        _below(
            "loss/d_adversarial",
            0.02,
            "the discriminator separates real from fake without error, so the generator learns nothing",
        ),
        ("raise loss.penalty_weight", "lower optimizer.discriminator_lr", "set augment.*"),
        fatal=False,
    ),
    "noise_ignored": Sign(
        _below(
            "fake/diversity",
            NOISE_IGNORED,
            "the pictures of a caption are all alike, which only suits captions that determine a picture",
        ),
        ("raise loss.g_mode_seeking",),
        fatal=False,
    ),
}
_WATCHED = {
    *(name for names, _, _ in EXPLODING.values() for name in names),
    *("fake/std", "real/std", "fake/magnitude", "real/magnitude", "fake/diversity", "loss/d_adversarial"),
}


@dataclass(eq=False)
class Diverged(Exception):
    """Training has left the healthy range; `since` is the number of images seen before the first sign began."""

    at: int
    since: int
    findings: Sequence[str]
    remedies: Sequence[str]

    def __str__(self) -> str:
        listed = "".join(f"\n  {finding}" for finding in self.findings)
        remedies = ", ".join(dict.fromkeys(self.remedies))
        head = f"training diverged at {self.at:,} images; the first sign began at {self.since:,} images"
        return f"{head}:{listed}\n  Remedies: {remedies}."

    def record(self, healthy: int, *, rewound: bool) -> dict[str, Any]:
        """The divergence as checkpoints record it (checkpoint/divergence.py)."""
        position = {"at": self.at, "since": self.since, "healthy": healthy}
        return {**position, "reason": self.findings[0], "rewound": rewound}


@dataclass
class _Episode:
    """A time in which a sign holds, perhaps with interruptions."""

    since: int  # images seen before it
    held: int = 0  # images of it with the sign, minus those without it


@dataclass
class Health:
    """Collects the metrics of the steps and checks them. Every rank has a `Health`, and all make the same calls.

    `batch` is the global batch, and `patience` the time for which a sign of divergence must hold, both in images. With
    `fatal=False`, a sign of divergence only leads to a warning.
    """

    batch: int
    patience: int
    fatal: bool = True
    begun: int = 0
    """Images seen at the last check: checkpoints up to there precede a sign that the next check finds."""
    _checkpoints: list[int] = field(default_factory=lambda: [0])  # images seen at checkpoints that looked healthy
    _last: Mapping[str, Tensor] = field(default_factory=dict)  # metrics of the last step
    _meter: Meter = field(default_factory=Meter)
    _usual: Usual = field(default_factory=lambda: Usual({}))
    _episodes: dict[str, _Episode] = field(default_factory=dict)
    _warned: list[str] = field(default_factory=list)

    @property
    def since(self) -> int | None:
        """Images seen before the signs of divergence that hold now; None if none does, or if they are not `fatal`."""
        return min((e.since for name, e in self._episodes.items() if self._is_fatal(name)), default=None)

    def broken(self, images: int, finding: str) -> Diverged:
        """The divergence of a run that has numbers that are not finite, as `finding` says."""
        return Diverged(images, self.begun if self.since is None else self.since, [finding], [RATES])

    def _is_fatal(self, name: str) -> bool:
        return self.fatal and SIGNS[name].fatal

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count the metrics of a step."""
        self._last = {name: value for name, value in metrics.items() if name in _WATCHED}
        self._meter.add(self.batch, self._last)

    def add_checkpoint(self, images: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Count the checkpoint at `images` as healthy, unless the last step showed a sign. Collective if `mean` is.

        A collapse can be complete within a window, before the average over the window shows it.
        """
        last = Meter()
        last.restore({name: (float(value), 1) for name, value in self._last.items()})
        values = last.take(mean)
        if self.since is None and not any(sign.fatal and sign.find(values, self._usual) for sign in SIGNS.values()):
            self._checkpoints.append(images)
        self._checkpoints = [
            count for count in self._checkpoints if count >= self.healthy()
        ]  # older ones are not needed

    def healthy(self, since: int | None = None) -> int:
        """Images seen at the last healthy checkpoint before a sign that began at `since` (default: the last check)."""
        end = self.begun if since is None else since
        return max((count for count in self._checkpoints if count <= end), default=0)

    def check(self, images: int, mean: Callable[[Tensor], Tensor] | None = None) -> list[str]:
        """The warnings that are due at `images` seen. Collective if `mean`, the average over the ranks, is collective.

        Raises Diverged when a sign of divergence has held for its patience.
        """
        if not passes(WINDOW * self.batch, images, self.batch):
            return []
        values = self._meter.take(mean)
        if not all(math.isfinite(value) for name, value in values.items() if not name.startswith("grad/")):
            return []  # the next report raises an error; until then `begun` stays at the last finite numbers
        found = {name: text for name, sign in SIGNS.items() if (text := sign.find(values, self._usual))}
        for group, (names, _, _) in EXPLODING.items():
            for name in () if group in found else names:
                if math.isfinite(values.get(name, math.inf)):
                    self._usual.add(name, values[name])
        due = [name for name in self._count(found, images) if name in found]
        fatal = [name for name in due if self._is_fatal(name)]
        if fatal and self.since is not None:
            signs = [name for name in found if self._is_fatal(name)]
            remedies = [remedy for name in signs for remedy in SIGNS[name].remedies]
            raise Diverged(images, self.since, [found[name] for name in signs], remedies)
        new = [name for name in due if name not in self._warned]
        self._warned += new
        begins = {name: f"{self._episodes[name].since:,} images" for name in new}
        return [f"since {begins[name]}, {found[name]}. Remedies: {', '.join(SIGNS[name].remedies)}" for name in new]

    def _count(self, found: Mapping[str, str], images: int) -> list[str]:
        """Bring the episodes up to date at the end of a window; returns those that have lasted for their patience."""
        begun, self.begun = self.begun, images
        patience = max(self.patience, LEAST_WINDOWS * WINDOW * self.batch)
        needed = {name: patience if sign.fatal else max(patience, WARNING_PATIENCE) for name, sign in SIGNS.items()}
        for name in found:
            self._episodes.setdefault(name, _Episode(begun))
        for name, episode in list(self._episodes.items()):
            episode.held = min(needed[name], episode.held + (images - begun) * (1 if name in found else -1))
            if episode.held <= 0:
                del self._episodes[name]
        return [name for name, episode in self._episodes.items() if episode.held >= needed[name]]

    def state(self, mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """What a checkpoint's state.json keeps under `health`. Collective if `mean` is."""
        return {
            "begun": self.begun,
            "since": self.since,
            "healthy": self.healthy(),
            "checkpoints": self._checkpoints,
            "window": self._meter.sums(mean),
            "usual": self._usual.means,
            "episodes": {name: [episode.since, episode.held] for name, episode in self._episodes.items()},
            "warned": self._warned,
        }

    def load(self, state: Mapping[str, Any] | None, images: int) -> None:
        """Restore what `state` returned at `images` seen; None, from a checkpoint of an earlier version, starts anew."""
        state = state or {}
        self.begun, self._last = state.get("begun", images), {}
        self._checkpoints = list(state.get("checkpoints", [images]))
        self._meter.restore(state.get("window", {}))
        self._usual = Usual(state.get("usual", {}))
        known = {name: episode for name, episode in state.get("episodes", {}).items() if name in SIGNS}
        self._episodes = {name: _Episode(*episode) for name, episode in known.items()}
        self._warned = list(state.get("warned", []))
