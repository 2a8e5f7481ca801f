"""Means, intervals over seeds, paired differences, and verdicts: pure functions of numbers."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t interval, which is infinite for a single seed."""

    mean: float
    low: float
    high: float
    sd: float
    """Standard deviation over seeds (n - 1 in the denominator)."""
    n: int


@dataclass(frozen=True)
class Measure:
    """The values of one metric on one split for all runs."""

    key: str
    name: str
    split: str
    better: str
    """`higher` or `lower`."""
    values: Mapping[str, Mapping[int, float]]
    """Maps an arm to a mapping from each of its seeds to the value."""
    floor: Mapping[str, float]
    ceiling: Mapping[str, float]

    def estimate(self, arm: str) -> Estimate:
        return estimate(list(self.values[arm].values()))


@dataclass(frozen=True)
class Difference:
    """How much better the reference is than an arm, paired by seed; a positive `gain` favors the reference."""

    measure: Measure
    arm: str
    reference: str
    gain: Estimate
    counted: Estimate
    """`gain` with an interval that is Bonferroni-corrected for the number of deciding comparisons."""

    @property
    def says(self) -> str:
        """Whether the reference is `better` or `worse` by the interval of `gain`; `nothing` if the interval contains
        0."""
        if self.gain.n < 2:
            return "nothing"
        return "better" if self.gain.low > 0 else "worse" if self.gain.high < 0 else "nothing"

    @property
    def sure(self) -> bool:
        """Whether the result `says` holds even after the Bonferroni correction for all deciding comparisons."""
        return self.says != "nothing" and (self.counted.low > 0 or self.counted.high < 0)


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean of one or more independent values, with its two-sided t interval."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, math.nan, n)
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = _half_width(sd, n, level)
    return Estimate(mean, mean - half, mean + half, sd, n)


def difference(measure: Measure, arm: str, reference: str, comparisons: int = 1) -> Difference:
    """The reference compared with an arm, paired by seed. `comparisons` is the number of deciding comparisons."""
    sign = 1 if measure.better == "higher" else -1
    values = measure.values[arm]
    gains = [sign * (value - values[seed]) for seed, value in measure.values[reference].items() if seed in values]
    level = 1 - (1 - LEVEL) / max(1, comparisons)
    return Difference(measure, arm, reference, estimate(gains), estimate(gains, level))


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for a probability in [0.5, 1) and at least one degree of freedom. Raises ValueError."""
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
    """The smallest number of seeds for which a gain with this mean and standard deviation has no 0 in its interval.

    None if more than `most` seeds are needed, or if the standard deviation is unknown.
    """
    if gain.n < 2 or gain.mean == 0:
        return None
    # The interval shrinks with every seed, so a binary search finds the smallest number.
    n = 2 + bisect_left(range(2, most + 1), True, key=lambda n: _half_width(gain.sd, n) <= abs(gain.mean))
    return n if n <= most else None


def _half_width(sd: float, n: int, level: float = LEVEL) -> float:
    """Half the width of the t interval of n values."""
    return t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)


# ---- in words --------------------------------------------------------------------------------------------------------


def verdict(hypothesis: str, differences: Sequence[Difference]) -> str:
    """The conclusion about a hypothesis from the differences of one arm in the deciding metrics, in Markdown."""
    says = {item.says for item in differences}
    if any(item.gain.n < 2 for item in differences):
        head = "no conclusion: an interval over seeds needs at least two seeds"
    elif {"better", "worse"} <= says:
        head = "the metrics disagree"
    elif says <= {"nothing"}:
        head = "neither supported nor contradicted: every interval contains 0"
    else:
        side, word = ("better", "supported") if "better" in says else ("worse", "contradicted")
        head = word
        if "nothing" in says:
            head += f" by {_names(differences, side)}; {_names(differences, 'nothing')} is inconclusive"
    details = " ".join(_sentence(item) for item in differences)
    return f"“{hypothesis}”: **{head}** (with this budget and this set). {details}"


def _names(differences: Iterable[Difference], says: str) -> str:
    return " and ".join(item.measure.name for item in differences if item.says == says)


def _sentence(item: Difference) -> str:
    gain, subject = item.gain, f"{item.measure.name}: {item.reference} is"
    if gain.n < 2:
        return f"{subject} {_signed(gain.mean)} in one seed."
    span = f"({100 * LEVEL:g}% interval {_signed(gain.low)} to {_signed(gain.high)}, {gain.n} seeds)"
    if item.says == "nothing":
        needed = seeds_needed(gain)
        seeds = f"about {needed} seeds" if needed else "only an impractical number of seeds"
        remedy = f"{seeds} would show a difference of this size"
        return f"{subject} {_signed(gain.mean)} {span}, which is inconclusive; {remedy}."
    holds = "also holds" if item.sure else "does not hold"
    return f"{subject} {_signed(gain.mean)} {span}; the difference {holds} after the Bonferroni correction."


def weakness(seeds: int) -> str:
    """A text about the limits of an interval over `seeds` seeds."""
    if seeds < 2:
        return "With one seed, an interval cannot be computed: any difference between two runs may be due to chance."
    known = 1.96 / math.sqrt(seeds)
    return (
        f"With {seeds} seeds, each interval is the mean ±{_half_width(1, seeds):.2f} standard deviations (±{known:.2f} "
        "if the standard deviation were known). Such an interval is valid only if the scores of seeds are normally "
        f"distributed, which {seeds} values cannot show. The intervals cannot show a difference that is "
        "smaller than half their width: “inconclusive” does not mean “no difference”."
    )


def _signed(value: float) -> str:
    """A gain in words: `0.031 better`, `0.2 worse`."""
    return f"{abs(value):.3g} {'better' if value >= 0 else 'worse'}"
