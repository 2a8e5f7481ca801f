"""Scores of the styles of generated pictures of OpenMoji: color, or black lines.

The style of a picture follows from the strength of its color (`judges/styles.py`), relative to that of the real colored
picture of the same caption: above UPPER it is color, and below LOWER it is black. A picture between these counts as
neither, as the mean of a colored and a black picture does. Captions whose colored picture has almost no color, such as
"black heart", are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_t2i.eval import metrics
from dist_t2i.eval.scores import Score

NAMES = ("color", "black", "neither")
STYLES = ("style-distance", "both-styles")
LOWER, UPPER = 0.3, 0.6
LEAST = 0.1
"""The least strength of a colored real picture whose caption counts; skin tones have 0.2."""


def style_of(strength: Tensor, colored: Tensor) -> Tensor:
    """Index into NAMES from the strength of pictures [..., N] and of the N captions' colored pictures: int64 [..., N]."""
    relative = strength / colored
    return torch.where(relative > UPPER, 0, torch.where(relative < LOWER, 1, 2))


def colored_strength(real: Tensor, ids: Tensor, attributes: Sequence[Mapping[str, Any]]) -> Tensor:
    """The mean strength of the real colored pictures of each caption; 0 for a caption without one: [N].

    `real` [N] are the strengths of the real pictures, and `ids` int64 [N] equal for pictures of one caption.
    """
    colored = torch.tensor([about["style"] == "color" for about in attributes])
    same = ((ids[:, None] == ids) & colored).to(real.dtype)
    return same @ real / same.sum(1).clamp_min(1)


def style_scores(
    fake: Tensor, real: Tensor, ids: Tensor, attributes: Sequence[Mapping[str, Any]], weights: Tensor, network: str
) -> list[Score]:
    """From the strengths of generated pictures [S, N, 1] and of real pictures [N, 1], with the captions' `ids` [N].

    `style-distance` is the total variation between the shares of styles of generated and real pictures. `both-styles` is
    the share of captions of which some pictures are colored and others black; its ceiling is that of pictures whose
    style is independent and equally likely. `weights` are the bootstrap weights [R, N] of the captions.
    """
    colored = colored_strength(real[:, 0], ids, attributes)
    counted = colored >= LEAST
    fake, real, colored, weights = fake[:, counted, 0], real[counted, 0], colored[counted], weights[:, counted]
    style, times = style_of(fake, colored), len(fake)
    each = torch.nn.functional.one_hot(style, len(NAMES)).double().mean(0)  # [N, styles]
    goal = torch.nn.functional.one_hot(style_of(real, colored), len(NAMES)).double().mean(0)
    shares = each.mean(0)
    distance = (shares - goal).abs().sum().item() / 2
    resampled = (weights @ each / weights.sum(1, keepdim=True) - goal).abs().sum(1) / 2
    parts = dict(zip(NAMES, shares.tolist(), strict=True))
    ends = {"the shares of the real pictures": 0.0}, {"one style": 1 - goal.max().item()}
    title = "styles: total variation from the real pictures"
    first = Score(
        "style_distance", title, distance, *metrics.around(distance, resampled), "lower", *ends, network, parts
    )
    both = ((style == 0).any(0) & (style == 1).any(0)).double()
    low, high = metrics.interval(metrics.weighted_mean(both, weights))
    ends = {"one style per caption": 0.0}, {"styles are independent": 1 - 2.0 ** (1 - times)}
    title = f"captions with both styles among {times} pictures"
    return [first, Score("both_styles", title, both.mean().item(), low, high, "higher", *ends, network)]
