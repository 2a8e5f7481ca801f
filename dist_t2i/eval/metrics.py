"""Metrics as pure functions of features and pixels: no networks, no files, and no randomness but a given seed.

None of these is FID, KID or R-precision as published, which are defined by other judges: a number is printed under
the name of the network that judged it, such as "KID (EfficientNet-Lite0)".

Every metric takes optional `weights` [R, N]: how often each row counts in each of R bootstrap resamples. Without
weights it returns a float, with them float64 [R]; `interval` turns those into a confidence interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""The Fitzpatrick tones of Unicode, lightest first, as `emoji` names them (followed by "skin tone")."""


# Distance between two sets of pictures


def kid(a: Tensor, b: Tensor, weights: Tensor | None = None) -> float | Tensor:
    """Unbiased squared MMD of features a [N, D] and b [M, D] under the kernel (cosine + 1)^3; N, M >= 2.

    KID's estimator and cubic kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4), over all pairs at once rather than
    the mean over subsets, on features scaled to length sqrt(D): x.y / D is then the cosine. Inception features have
    about that length by themselves; EfficientNet-Lite0's are shorter (16 instead of 36), and unscaled the same damage
    gives a ninth of the value. May be a little negative when the sets are alike, more so (-.03 at N = 235) when
    they hold the same pictures, since a picture is compared with its own copy.

    `weights` [R, N] needs N == M, row i of both being one caption's. A row that the bootstrap drew twice is not
    compared with itself, so resamples are as unbiased as the whole.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"needs at least 2 pictures on each side, got {len(a)} and {len(b)}")
    a, b = unit(a), unit(b)
    within_a, within_b, between = ((x @ y.T + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    if weights is None:
        ones_a, ones_b = (torch.ones(1, len(x), dtype=torch.double) for x in (a, b))
        inside = off_diagonal_mean(within_a, ones_a) + off_diagonal_mean(within_b, ones_b)
        return (inside - 2 * between.mean()).item()
    own = weights @ between.diagonal() / weights.sum(1)
    across = own / len(a) + off_diagonal_mean(between, weights) * (1 - 1 / len(a))
    return off_diagonal_mean(within_a, weights) + off_diagonal_mean(within_b, weights) - 2 * across


def off_diagonal_mean(kernel: Tensor, weights: Tensor) -> Tensor:
    """Mean of kernel [N, N] over pairs of different rows, row i counting weights[r, i] times: [R]."""
    pairs = ((weights @ kernel) * weights).sum(1) - (weights**2 @ kernel.diagonal())
    return pairs / (weights.sum(1) ** 2 - (weights**2).sum(1))


# Retrieval


def retrieval_ranks(queries: Tensor, pictures: Tensor) -> Tensor:
    """How many other pictures [M, D] are at least as near to query i [N, D] as picture i % M is: int64 [N].

    Nearness is the cosine. Ties count against the query, so a network that gives every picture the same features
    ranks last. With several queries per picture, stack them: all pictures once, then all again.
    """
    nearness = unit(queries) @ unit(pictures).T
    true = nearness.gather(1, (torch.arange(len(queries)) % len(pictures))[:, None])
    return (nearness >= true).sum(1) - 1


def unit(rows: Tensor) -> Tensor:
    """Rows [N, D] at length one, in float64; a row of zeros stays zero."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def recall_at(k: int, ranks: Tensor, pictures: int, gallery: int = 100) -> Tensor:
    """Per query, the probability that its picture is among the first `k` of a random gallery: float64 [N].

    A gallery holds the true picture and `gallery` - 1 of the other `pictures` - 1. Instead of drawing galleries, this
    is the mean over all of them in closed form: of the `rank` pictures that beat the true one, fewer than k may be
    drawn (hypergeometric). No seed, no noise from the drawing, same value on every machine. With fewer pictures than
    `gallery`, all of them are the gallery.
    """
    others, drawn = pictures - 1, min(gallery, pictures) - 1
    total = math.comb(others, drawn)
    table = [
        sum(math.comb(rank, j) * math.comb(others - rank, drawn - j) for j in range(min(k, drawn + 1))) / total
        for rank in range(pictures)
    ]
    return torch.tensor(table, dtype=torch.double)[ranks]


def weighted_mean(values: Tensor, weights: Tensor | None = None) -> float | Tensor:
    """Mean of values [N]; with weights [R, N] (or [R, M] for values of M captions x N/M seeds), one mean a resample."""
    values = values.double()
    if weights is None:
        return values.mean().item()
    per_caption = values.reshape(-1, weights.shape[1]).mean(0)
    return weights.double() @ per_caption / weights.double().sum(1)


# Tone order


def split_tone(caption: str) -> tuple[str, str, str] | None:
    """("man vampire ", "medium-dark", "") of "man vampire medium-dark skin tone"; None unless there is exactly one."""
    found = re.findall(r"(?<![\w-])(medium-light|medium-dark|light|medium|dark) skin tone", caption)
    if len(found) != 1 or caption.count("skin tone") != 1:
        return None
    before, after = caption.split(f"{found[0]} skin tone")
    return before, found[0], after


def tone_pair(caption: str) -> tuple[str, str] | None:
    """The same caption in light and in dark skin tone; None when it names no single skin tone."""
    parts = split_tone(caption)
    if parts is None:
        return None
    before, _, after = parts
    return f"{before}light skin tone{after}", f"{before}dark skin tone{after}"


def tone_order(light: Tensor, dark: Tensor) -> Tensor:
    """1 where picture i of `light` [N, 3, H, W] uint8 is brighter than picture i of `dark`, else 0: float64 [N].

    Both are made from one noise and from captions that differ in the tone alone, so what differs is the skin, and
    the mean luma of the whole picture orders it. On real OpenMoji pairs at 32 px that is right 331 times of 331, and
    stays right for 99.7% under strong noise; picking skin pixels by their colour errs on 3, and on 30% under noise
    (hair and clothes have skin colours too).
    """
    return (brightness(light) > brightness(dark)).double()


def brightness(images: Tensor) -> Tensor:
    """Mean Rec. 601 luma, 0 to 255, of pictures uint8 [N, 3, H, W]: float64 [N]."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double)
    return images.double().mean(dim=(2, 3)) @ weights


# Confidence


def bootstrap_weights(groups: Sequence[Hashable], resamples: int = 1000, seed: int = 0) -> Tensor:
    """How often each row is drawn in each resample: float64 [resamples, N].

    Rows of the same group (the two tones of one role, say) are drawn together, with replacement among groups, because
    they are not independent; pass `range(N)` when every row stands alone.
    """
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(index), (resamples, len(index)), generator=generator)
    counts = torch.zeros(resamples, len(index), dtype=torch.double)
    counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.double))
    return counts[:, [index[group] for group in groups]]


def interval(resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a metric's values [R] over bootstrap resamples."""
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high
