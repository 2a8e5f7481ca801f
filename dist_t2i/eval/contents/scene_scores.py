"""Scores of generated scenes: what captions name (number, color, shape, relation), and what they leave open.

All attributes are those that the detector (`judges/attributes.py`) finds. A caption names one or two objects with their
colors and shapes, and of two objects the relation. For each generated picture,

    number right      the picture shows as many objects as the caption names
    color right       the colors of the objects in the picture are the caption's, in any order, each as often
    shape right       the same for shapes
    all right         the pairs of a color and a shape are the caption's, and so is the relation, if there is one
    relation right    of the pictures for captions with two objects that show exactly these two: the relation is right

So "a red disc left of a blue star" as a blue disc left of a red star has the right colors and shapes, but not all right.
The relation is that of the larger distance: horizontal or vertical.

Captions leave the background, positions and sizes open. Their distributions are compared with those of the real pictures
of the same captions, one picture per caption at a time, so that both sides have the same number of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_t2i.eval import metrics
from dist_t2i.eval.judges.attributes import Shown
from dist_t2i.eval.judges.detector import COLORS, KINDS, SHAPES
from dist_t2i.eval.scores import Score

RELATIONS = ("left of", "right of", "above", "below")
HUES = 24
"""Number of bins of a histogram of hues."""
_SHIFTS = 20
_REAL, _OTHER = "the real pictures", "the real pictures with other captions"
_AGAIN = "other real pictures of the same captions"


@dataclass(frozen=True)
class Named:
    """What N captions name."""

    pairs: Tensor
    """int64 [N, 64], how often each pair of a color and a shape is named"""
    first: Tensor
    """int64 [N], the pair of the first object"""
    relation: Tensor
    """int64 [N], index into RELATIONS of the relation of the first object to the second; -1 for one object"""

    @classmethod
    def of(cls, attributes: Sequence[Mapping[str, Any]]) -> Named:
        """From the attributes of scenes, as in dist_t2i/data/scenes.py."""
        numbers = [
            [COLORS.index(item["color"]) * len(SHAPES) + SHAPES.index(item["shape"]) for item in about["objects"]]
            for about in attributes
        ]
        pairs = torch.stack([torch.tensor(row).bincount(minlength=len(COLORS) * len(SHAPES)) for row in numbers])
        relations = [RELATIONS.index(about["relation"]) if about["relation"] else -1 for about in attributes]
        return cls(pairs, torch.tensor([row[0] for row in numbers]), torch.tensor(relations))

    def shifted(self, by: int) -> Named:
        """Captions moved on by some pictures."""
        return Named(self.pairs.roll(by, 0), self.first.roll(by), self.relation.roll(by))

    @property
    def two(self) -> Tensor:
        """bool [N], whether a caption names two objects."""
        return self.relation >= 0


def right(shown: Shown, named: Named) -> dict[str, tuple[Tensor, Tensor]]:
    """Score -> (whether it is right, whether it counts) for pictures [..., N] of N captions, each bool [..., N]."""
    pair = shown.color * len(SHAPES) + shown.shape
    count = _counts(pair, shown.present, named.pairs.shape[1])
    by_color, asked_color = (rows.unflatten(-1, (len(COLORS), -1)).sum(-1) for rows in (count, named.pairs))
    by_shape, asked_shape = (rows.unflatten(-1, (len(COLORS), -1)).sum(-2) for rows in (count, named.pairs))
    pairs = (count == named.pairs).all(-1)
    identified = pairs & named.two
    is_first = shown.present & (pair == named.first[:, None])
    sign = torch.where(is_first, 1.0, -1.0) * shown.present
    right_by, down_by = (sign * shown.x).sum(-1), (sign * shown.y).sum(-1)
    horizontal = right_by.abs() > down_by.abs()
    relation = torch.where(horizontal, (right_by > 0).long(), 2 + (down_by > 0).long())
    related = identified & (relation == named.relation)
    everything = torch.where(named.two, related, pairs)
    always = torch.ones_like(pairs)
    return {
        "number-right": (count.sum(-1) == named.pairs.sum(-1), always),
        "color-right": ((by_color == asked_color).all(-1), always),
        "shape-right": ((by_shape == asked_shape).all(-1), always),
        "relation-right": (related, identified),
        "all-right": (everything, always),
        "all-right-one": (everything, always & ~named.two),
        "all-right-two": (everything, always & named.two),
    }


def _counts(index: Tensor, present: Tensor, width: int) -> Tensor:
    """How often each index [..., K] is present: int64 [..., width]."""
    counts = torch.zeros(*index.shape[:-1], width, dtype=torch.int64)
    return counts.scatter_add_(-1, index, present.long())


_TITLES = {
    "number-right": "number of objects right",
    "color-right": "colors right",
    "shape-right": "shapes right",
    "relation-right": "relation right, where both objects are",
    "all-right": "all attributes right",
    "all-right-one": "all attributes right, one object",
    "all-right-two": "all attributes right, two objects",
}
NAMED = tuple(_TITLES)


def named_scores(
    fake: Tensor, real: Tensor, attributes: Sequence[Mapping[str, Any]], weights: Tensor, network: str
) -> list[Score]:
    """How often each attribute is right, from the detector's features of generated pictures [S, N, W].

    `real` are the features [K, N, W] of real pictures of the N captions, and `weights` the bootstrap weights [R, N] of
    the captions. The ceiling is the score of the real pictures: how often the detector is right. Floor: the real
    pictures with the captions of others; 1 of 4 for the relation.
    """
    named = Named.of(attributes)
    found, ceiling = right(Shown.of(fake), named), right(Shown.of(real), named)
    others = [right(Shown.of(real), named.shifted(1 + shift % max(1, real.shape[1] - 1))) for shift in range(_SHIFTS)]
    scores = []
    for metric, (hits, counted) in found.items():
        if metric.startswith("all-right-") and not counted.any():
            continue
        floor = {_OTHER: sum(_share(*part[metric]) for part in others) / _SHIFTS}
        if metric == "relation-right":
            floor = {"chance": 0.25}
        numbers = (hits & counted).sum(0).double(), counted.sum(0).double()
        resampled = (weights @ numbers[0]) / (weights @ numbers[1]).clamp_min(1)
        low, high = metrics.interval(resampled) if counted.any() else (0.0, 1.0)
        ends = floor, {_REAL: _share(*ceiling[metric])}
        parts = (
            {"share of pictures that show both": _share(counted, counted | named.two)}
            if metric == "relation-right"
            else {}
        )
        key, value = metric.replace("-", "_"), _share(hits, counted)
        scores.append(Score(key, _TITLES[metric], value, low, high, "higher", *ends, network, parts))
    return scores


def _share(hits: Tensor, counted: Tensor) -> float:
    """The share of hits among what counts; 0 if nothing counts."""
    return (hits & counted).sum().item() / max(1, counted.sum().item())


# ---- what captions leave open ----------------------------------------------------------------------------------------


def open_scores(
    fake: Tensor, real: Tensor, again: Tensor, weights: Tensor, resamples: int, network: str
) -> list[Score]:
    """Distributions of what captions leave open, from the detector's features of generated pictures [S, N, W].

    `real` [N, W] and `again` [K, N, W] are features of real pictures of the same captions, and `weights` the bootstrap
    weights [R, N] of the captions, of which most scores use the first `resamples`.

    `hue-entropy` is the entropy of a histogram with HUES bins, divided by that of equal bins. `hue-spread` is the mean of
    1 - cos(difference) of the hues of two pictures of one caption: 0 if the caption decides the hue, 1 if hues are
    uniform and independent. The distances are total variation (kinds) and Kolmogorov-Smirnov distances (radii; the mean
    of those of x and y).
    """
    samples = [torch.arange(len(real)).repeat_interleave(row) for row in weights[:resamples].long()]

    def score(metric: str, value: Callable[[Tensor], float], floor: _Ends, ceiling: _Ends, **more: Any) -> Score:
        mean = _mean(value(part) for part in fake)
        interval = metrics.around(mean, torch.tensor([_mean(value(part[row]) for part in fake) for row in samples]))
        better = "lower" if metric.endswith("distance") else "higher"
        key = metric.replace("-", "_")
        return Score(key, _OPEN[metric], mean, *interval, better, floor, ceiling, network, **more)

    def distance(metric: str, apart: Callable[[Tensor, Tensor], float], alike: _Ends, **more: Any) -> Score:
        floor = {_AGAIN: _mean(apart(part, real) for part in again)}
        return score(metric, lambda part: apart(part, real), floor, alike, **more)

    scores = [score("hue-entropy", _hue_entropy, {"one hue": 0.0}, {_REAL: _hue_entropy(real)})]
    if len(fake) > 1:
        scores.append(_hue_spread(fake, weights, network))
    shares = dict(zip(KINDS, _kinds(fake.flatten(0, 1)).tolist(), strict=True))
    one_kind = {"one kind": 1 - _kinds(real).max().item()}
    scores.append(distance("background-distance", _kinds_apart, one_kind, parts=shares))
    scores.append(distance("size-distance", _radii_apart, {"one size": 0.5}))
    scores.append(distance("position-distance", _positions_apart, {"one position": 0.5}))
    return scores


_OPEN = {
    "hue-entropy": "background: entropy of the hue",
    "hue-spread": "background: spread of the hue within one caption",
    "background-distance": "background: total variation of its kind from the real pictures",
    "size-distance": "objects: KS distance of sizes from the real pictures",
    "position-distance": "objects: KS distance of positions from the real pictures",
}
OPEN = tuple(_OPEN)
_Ends = dict[str, float]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _hue_entropy(features: Tensor) -> float:
    shares = torch.histc(Shown.of(features).hue, HUES, 0, 1).double() / len(features)
    return torch.special.entr(shares).sum().item() / math.log(HUES)


def _hue_spread(fake: Tensor, weights: Tensor, network: str) -> Score:
    angle = Shown.of(fake).hue.double() * 2 * math.pi
    count = len(angle)
    alike = (angle.cos().sum(0) ** 2 + angle.sin().sum(0) ** 2 - count) / (count * (count - 1))
    low, high = metrics.interval(metrics.weighted_mean(1 - alike, weights))
    ends = {"the caption decides the hue": 0.0}, {"hues are independent": 1.0}
    return Score("hue_spread", _OPEN["hue-spread"], (1 - alike).mean().item(), low, high, "higher", *ends, network)


def _kinds(features: Tensor) -> Tensor:
    """The share of each kind of background."""
    return Shown.of(features).kind.bincount(minlength=len(KINDS)).double() / len(features)


def _kinds_apart(a: Tensor, b: Tensor) -> float:
    return (_kinds(a) - _kinds(b)).abs().sum().item() / 2


def _radii_apart(a: Tensor, b: Tensor) -> float:
    one, other = Shown.of(a), Shown.of(b)
    return metrics.kolmogorov_smirnov(one.radius[one.present], other.radius[other.present])


def _positions_apart(a: Tensor, b: Tensor) -> float:
    one, other = Shown.of(a), Shown.of(b)
    sides = (one.x, other.x), (one.y, other.y)
    return _mean(metrics.kolmogorov_smirnov(mine[one.present], real[other.present]) for mine, real in sides)
