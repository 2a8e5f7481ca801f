"""Means, intervals over seeds, paired differences, and what they allow to say: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t interval; the interval is infinite for a single seed."""

    mean: float
    low: float
    high: float
    sd: float
    """Standard deviation over seeds (n - 1 in the denominator)."""
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Measure:
    """One metric on one split: its value for every run."""

    key: str
    name: str
    split: str
    better: str
    """`higher` or `lower`."""
    values: Mapping[str, Mapping[int, float]]
    """arm -> seed -> value"""
    floor: Mapping[str, float]
    ceiling: Mapping[str, float]

    def estimate(self, arm: str) -> Estimate:
        return estimate(list(self.values[arm].values()))


@dataclass(frozen=True)
class Difference:
    """How much better the reference is than an arm, seed by seed: above 0 the reference is better, whatever the metric."""

    measure: Measure
    arm: str
    reference: str
    gain: Estimate
    counted: Estimate
    """The same at the level at which all comparisons that decide are right together (Bonferroni)."""

    @property
    def says(self) -> str:
        """`better`, `worse` (the reference, that is) or `nothing`."""
        if self.gain.n < 2:
            return "nothing"
        return "better" if self.gain.low > 0 else "worse" if self.gain.high < 0 else "nothing"

    @property
    def sure(self) -> bool:
        """Whether it says the same with all comparisons counted."""
        return self.says != "nothing" and (self.counted.low > 0 or self.counted.high < 0)


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean and two-sided t interval of independent values, at least one."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, math.nan, n)
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    reach = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Estimate(mean, mean - reach, mean + reach, sd, n)


def difference(measure: Measure, arm: str, reference: str, comparisons: int = 1) -> Difference:
    """Paired over the seeds that both arms have. `comparisons` is how many decide together."""
    ours, theirs = measure.values[reference], measure.values[arm]
    sign = 1 if measure.better == "higher" else -1
    gains = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    level = 1 - (1 - LEVEL) / max(1, comparisons)
    return Difference(measure, arm, reference, estimate(gains), estimate(gains, level))


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t: the value below which `probability` (0.5 to 1) lies, for whole degrees of freedom from 1 up."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile of {probability} with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while (1 + _within(high, freedom)) / 2 < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _within(middle, freedom)) / 2 < probability else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t) in closed form (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square, odd = math.cos(angle) ** 2, freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    term = total = math.cos(angle) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * square
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def seeds_needed(gain: Estimate, most: int = 1000) -> int | None:
    """Seeds with which an interval around a difference as large as this would leave out 0, at this spread; None: more
    than `most`, or no spread is known."""
    if gain.n < 2 or gain.mean == 0 or _reach(gain.sd, most) > abs(gain.mean):
        return None
    low, high = 1, most  # the interval shrinks with every seed, so halving finds the first that is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _reach(gain.sd, middle) <= abs(gain.mean) else (middle, high)
    return high


def _reach(sd: float, n: int) -> float:
    """Half the width of the interval of n values."""
    return t_quantile((1 + LEVEL) / 2, n - 1) * sd / math.sqrt(n)


# ---- in words --------------------------------------------------------------------------------------------------------


def verdict(claim: str, differences: Sequence[Difference]) -> str:
    """What the differences of one arm, on the metrics that decide, allow to say about a claim of the paper."""
    says = [one.says for one in differences]
    if any(one.gain.n < 2 for one in differences):
        head = "nothing can be said: an interval over seeds needs at least two"
    elif "better" in says and "worse" in says:
        head = "the metrics disagree"
    elif says.count("better") == len(says):
        head = "supported"
    elif says.count("worse") == len(says):
        head = "contradicted"
    elif "better" in says:
        head = f"supported by {_names(differences, 'better')}; {_names(differences, 'nothing')} says nothing"
    elif "worse" in says:
        head = f"contradicted by {_names(differences, 'worse')}; {_names(differences, 'nothing')} says nothing"
    else:
        head = "neither supported nor contradicted: no interval leaves out 0"
    said = " ".join(_sentence(one) for one in differences)
    return f"“{claim}”: **{head}** (at this budget, on this set). {said}"


def _names(differences: Iterable[Difference], says: str) -> str:
    return " and ".join(one.measure.name for one in differences if one.says == says)


def _sentence(one: Difference) -> str:
    name, gain = one.measure.name, one.gain
    if gain.n < 2:
        return f"{name}: {one.reference} is {_signed(gain.mean)} in one seed."
    span = f"({_percent(LEVEL)} interval {_signed(gain.low)} to {_signed(gain.high)}, {gain.n} seeds)"
    if one.says == "nothing":
        needed = seeds_needed(gain)
        more = f"about {needed} seeds would tell" if needed else "more seeds than can be had would be needed to tell"
        return (
            f"{name}: {one.reference} is {_signed(gain.mean)} {span}: anything in that range fits what was seen; if the "
            f"difference is as large as it looks, {more}."
        )
    side = "better" if one.says == "better" else "worse"
    kept = "it stays so" if one.sure else "it does not stay so"
    return f"{name}: {one.reference} is {side} by {abs(gain.mean):.3g} {span}; {kept} when all comparisons are counted."


def weakness(seeds: int) -> str:
    """How much an interval over so few seeds is worth, in words."""
    if seeds < 2:
        return "One seed has no interval: what one run does better than another may be chance alone."
    factor, many = t_quantile((1 + LEVEL) / 2, seeds - 1), 1.96
    return (
        f"{seeds} seeds make an interval of ±{factor / math.sqrt(seeds):.2f} standard deviations (with many seeds of the "
        f"same number it would be ±{many / math.sqrt(seeds):.2f}), and it is right only if seeds scatter normally, which "
        f"{seeds} numbers cannot show. A difference smaller than that stays unseen: saying nothing is not saying “no "
        "difference”."
    )


def _signed(value: float) -> str:
    """A gain as people read it: `0.031 better`, `0.2 worse`."""
    return f"{abs(value):.3g} {'better' if value >= 0 else 'worse'}"


def _percent(level: float) -> str:
    return f"{100 * level:g}%"
