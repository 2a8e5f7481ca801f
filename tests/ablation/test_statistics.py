"""Intervals, differences and verdicts on synthetic numbers."""

import math
import statistics

import pytest

from dist_t2i.ablation.statistics import Measure, difference, estimate, seeds_needed, t_quantile, verdict, weakness


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),  # from the tables of Abramowitz & Stegun (26.10)
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.995, 5, 4.032),
    ],
)
def test_students_t(probability, freedom, value):
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)


def test_an_estimate_is_the_textbooks():
    values = [0.21, 0.25, 0.20, 0.28]
    result = estimate(values)
    reach = 3.182446 * statistics.stdev(values) / 2
    assert result.mean == pytest.approx(statistics.mean(values)) and result.n == 4
    assert (result.low, result.high) == pytest.approx((result.mean - reach, result.mean + reach))
    alone = estimate([0.3])
    assert alone.mean == 0.3 and math.isinf(alone.high) and math.isinf(alone.low)


def measure(key="recall_at_1", better="higher", **arms):
    return Measure(key, key, "test", better, {arm: dict(enumerate(values)) for arm, values in arms.items()}, {}, {})


def test_differences_are_paired_over_the_seeds_that_both_have():
    """Scores that vary widely between seeds, but equally in both arms, give a clear difference."""
    spread = measure(dual=[0.1, 0.5, 0.9, 0.3], shared=[0.05, 0.46, 0.84])
    result = difference(spread, "shared", "dual")
    assert result.gain.n == 3 and result.gain.mean == pytest.approx(0.05) and result.says == "better"
    assert (
        estimate([0.1, 0.5, 0.9]).low < estimate([0.05, 0.46, 0.84]).high
    )  # unpaired, the difference would be inconclusive


def test_lower_may_be_better():
    assert difference(measure("kid", "lower", a=[1.0, 1.1, 1.05], b=[2.0, 2.1, 2.0]), "b", "a").says == "better"
    assert difference(measure("kid", "lower", a=[2.0, 2.1, 2.0], b=[1.0, 1.1, 1.05]), "b", "a").says == "worse"


def test_all_comparisons_counted_is_stricter():
    some = measure(dual=[0.30, 0.33, 0.31], shared=[0.28, 0.30, 0.285])
    one, many = difference(some, "shared", "dual"), difference(some, "shared", "dual", 6)
    assert one.sure and one.counted == one.gain
    assert many.gain == one.gain and many.counted.low < one.counted.low
    assert many.says == "better" and not many.sure


BETTER = measure(dual=[0.40, 0.42, 0.41, 0.40], other=[0.20, 0.21, 0.22, 0.20])
WORSE = measure("kid", "lower", dual=[2.0, 2.1, 2.0, 2.0], other=[1.0, 1.0, 1.1, 1.0])
NOTHING = measure("kid", "lower", dual=[1.0, 2.0, 1.5, 1.2], other=[1.5, 1.4, 1.2, 1.9])


@pytest.mark.parametrize(
    ("measures", "head"),
    [
        ([BETTER], "**supported**"),
        ([WORSE], "**contradicted**"),
        ([NOTHING], "**neither supported nor contradicted"),
        ([BETTER, WORSE], "**the metrics disagree**"),
        ([BETTER, NOTHING], "**supported by recall_at_1; kid is inconclusive**"),
        ([WORSE, NOTHING], "**contradicted by kid; kid is inconclusive**"),
    ],
)
def test_a_verdict_says_what_the_intervals_say(measures, head):
    text = verdict("two beat one", [difference(item, "other", "dual", len(measures)) for item in measures])
    assert text.startswith("“two beat one”: ") and head in text


def test_a_verdict_that_says_nothing_says_what_it_would_take():
    result = difference(NOTHING, "other", "dual")
    needed = seeds_needed(result.gain)
    assert needed and needed > 4
    text = verdict("two beat one", [result])
    assert f"about {needed} seeds would show a difference of this size" in text and "which is inconclusive" in text
    assert "worse to" in text and "better" in text


def test_one_seed_says_nothing():
    result = difference(measure(dual=[0.9], other=[0.1]), "other", "dual")
    assert result.says == "nothing" and not result.sure
    assert "no conclusion" in verdict("two beat one", [result])
    assert "due to chance" in weakness(1) and "±2.48" in weakness(3)


def test_equal_arms_say_nothing():
    same = difference(measure(dual=[0.5, 0.6, 0.7], other=[0.5, 0.6, 0.7]), "other", "dual")
    assert same.says == "nothing" and seeds_needed(same.gain) is None
    assert "neither" in verdict("two beat one", [same])
