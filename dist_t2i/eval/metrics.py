"""Metrics as pure functions of features and pixels: no networks, no files, no randomness except from a given seed.

A metric has its published name only with the feature network that defines it: `FeatureNetwork.called` names scores.
Bootstrap weights say how often each row counts in a resample: [N] for one resample, [R, N] for R of them. `interval` and
`around` turn the values of resamples into a confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from dist_t2i.data.stream.batch import caption_id
from dist_t2i.utils.seeds import Purpose, mix

# ---- distances between two sets of pictures --------------------------------------------------------------------------


def kid(a: Tensor, b: Tensor, *, scaled: bool = True) -> float:
    """Unbiased squared MMD of features a [N, D] and b [M, D] under the kernel (cosine + 1)^3; N, M >= 2.

    KID's estimator and cubic kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4), over all pairs rather than subsets, on
    features scaled to length sqrt(D) unless `scaled` is False. Inception features have about this length anyway;
    EfficientNet-Lite0's have 16 instead of 36, so without scaling the same damage gives a ninth of the value. The value
    may be negative for similar sets, the more if they share pictures, which are then compared with their copies.
    """
    a, b = _kernel_rows(a, b, scaled)
    within = sum(off_diagonal_mean(x, x, torch.ones(1, len(x), dtype=torch.double)) for x in (a, b))
    between = sum(cubic(a[rows], b).sum() for rows in _blocks(len(a))) / (len(a) * len(b))
    return (within - 2 * between).item()


def kid_resamples(a: Tensor, b: Tensor, weights: Tensor, *, scaled: bool = True) -> Tensor:
    """`kid` of R resamples, float64 [R], for weights [R, N] and features a, b [N, D] whose rows i share a caption.

    A row that a resample holds twice is not compared with itself, so resamples are as unbiased as the full sets.
    """
    a, b = _kernel_rows(a, b, scaled)
    same = weights @ cubic(a[:, None], b[:, None]).flatten() / weights.sum(1)
    between = same / len(a) + off_diagonal_mean(a, b, weights) * (1 - 1 / len(a))
    return off_diagonal_mean(a, a, weights) + off_diagonal_mean(b, b, weights) - 2 * between


def _kernel_rows(a: Tensor, b: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"needs at least 2 pictures on each side, got {len(a)} and {len(b)}")
    if scaled:
        return unit(a), unit(b)
    return a.double() / a.shape[1] ** 0.5, b.double() / b.shape[1] ** 0.5


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel of rows [..., N, D] and [..., M, D], which hold features divided by sqrt(D): [..., N, M]."""
    return (x @ y.mT + 1.0) ** 3


def off_diagonal_mean(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Mean of `cubic` over pairs of different rows of x and y [N, D], row i counting weights[r, i] times: [R]."""
    pairs = torch.zeros(len(weights), dtype=torch.double)
    for rows in _blocks(len(x)):  # the full kernel of 30,000 pictures would take 7 GB
        kernel, own = cubic(x[rows], y), weights[:, rows]
        pairs += ((own @ kernel) * weights).sum(1) - own**2 @ kernel.diagonal(rows.start)
    return pairs / (weights.sum(1) ** 2 - (weights**2).sum(1))


def _blocks(rows: int, size: int = 2048) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def frechet(a: Tensor, b: Tensor, weights_a: Tensor | None = None, weights_b: Tensor | None = None) -> float:
    """Frechet distance of Gaussians fitted to features a [N, D] and b [M, D] (Heusel et al. 2017, eq. 6).

    torch-fidelity computes the reported values; this one takes weights [N] and [M], and is faster with fewer rows than
    columns: the trace of the root of a product of covariances A'A B'B is the sum of the singular values of AB'. The
    distance grows as the number of pictures falls: compare equal numbers only.
    """
    mean_a, a = _centered(a.double(), weights_a)
    mean_b, b = _centered(b.double(), weights_b)
    if min(len(a), len(b)) < a.shape[1]:
        root = torch.linalg.svdvals(a @ b.T).sum()
    else:
        values, vectors = torch.linalg.eigh(a.T @ a)
        half = vectors * values.clamp_min(0).sqrt() @ vectors.T
        root = torch.linalg.eigvalsh(half @ (b.T @ b) @ half).clamp_min(0).sqrt().sum()
    return (((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root).item()


def _centered(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean [D], and rows X with X'X = covariance."""
    weights = torch.ones(len(rows), dtype=torch.double) if weights is None else weights.double()
    mean = weights @ rows / weights.sum()
    return mean, (rows - mean) * (weights / (weights.sum() - 1)).sqrt()[:, None]


def inception_score(logits: Tensor, weights: Tensor | None = None) -> float:
    """exp of the mean KL divergence of p(class | picture) from p(class), from logits [N, C], in one part: at least 1.

    Salimans et al. 2016, sec. 4. The published score is the mean over ten parts, which torch-fidelity computes.
    """
    weights = torch.ones(len(logits), dtype=torch.double) if weights is None else weights.double()
    share, log = weights / weights.sum(), logits.double().log_softmax(1)
    marginal = share @ log.exp()
    return (share @ (log.exp() * (log - marginal.clamp_min(1e-300).log())).sum(1)).exp().item()


def in_manifold(queries: Tensor, rows: Tensor, neighbours: int = 3) -> Tensor:
    """1 where a query [N, D] is no farther from some row [M, D] than that row's k-th nearest other row: float64 [N].

    Kynkaanniemi et al. 2019, sec. 3: precision is the mean over generated queries in the manifold of the real rows,
    recall over real queries in that of the generated ones. Equals torch-fidelity's.
    """
    queries, rows = queries.float(), rows.float()
    neighbours = min(neighbours, len(rows) - 1)
    radii = torch.cat([torch.cdist(rows[part], rows).kthvalue(neighbours + 1).values for part in _blocks(len(rows))])
    return torch.cat([(torch.cdist(queries[p], rows) <= radii).any(1) for p in _blocks(len(queries))]).double()


# ---- agreement of pictures and captions ------------------------------------------------------------------------------


def retrieval_ranks(queries: Tensor, pictures: Tensor) -> Tensor:
    """How many other pictures [M, D] are at least as near (by cosine) to query i [N, D] as picture i % M is: int64 [N].

    Ties count against the query, so a network with the same features for every picture ranks last. Several queries per
    picture are stacked: one for each picture, then another for each picture.
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

    A gallery holds the true picture and `gallery` - 1 of the `pictures` - 1 others (or all). The mean over all galleries is
    hypergeometric: fewer than k of the `rank` pictures that are nearer than the true one are in the gallery.
    """
    others, sampled = pictures - 1, min(gallery, pictures) - 1
    total = math.comb(others, sampled)
    table = [
        sum(math.comb(rank, j) * math.comb(others - rank, sampled - j) for j in range(min(k, sampled + 1))) / total
        for rank in range(pictures)
    ]
    return torch.tensor(table, dtype=torch.double)[ranks]


def mismatched(captions: Sequence[str], count: int = 99) -> Tensor:
    """For each caption, the rows of `count` different ones: int64 [N, count], or as many as there are.

    The committed rule: torch's permutation of the rows, seeded by the hash of the caption, without captions that are
    equal up to case and spacing to the caption or to an earlier row.
    """
    ids = [caption_id(caption) for caption in captions]
    count = min(count, len(set(ids)) - 1)
    result = []
    for own in ids:
        generator = torch.Generator().manual_seed(mix(own, Purpose.R_PRECISION_CANDIDATES))
        order = torch.randperm(len(ids), generator=generator).tolist()
        rows: dict[int, int] = {own: -1}
        for row in order:
            rows.setdefault(ids[row], row)
            if len(rows) > count:
                break
        result.append([row for row in rows.values() if row >= 0])
    return torch.tensor(result, dtype=torch.int64).reshape(len(ids), count)


def r_precision(pictures: Tensor, texts: Tensor, others: Tensor) -> Tensor:
    """1 where text i is nearer to picture i than all texts[others[i]] (Xu et al. 2018, sec. 4, R = 1): float64 [N]."""
    if not others.shape[1]:
        return torch.ones(len(pictures), dtype=torch.double)
    pictures, texts = unit(pictures), unit(texts)
    own = (pictures * texts).sum(1)
    parts = [torch.einsum("nd,nkd->nk", pictures[p], texts[others[p]]).amax(1) for p in _blocks(len(pictures), 256)]
    return (own > torch.cat(parts)).double()


def clip_score(pictures: Tensor, texts: Tensor) -> Tensor:
    """Hessel et al. 2021, eq. 1, with 100 for 2.5: 100 x cosine of picture and text i, at least 0, as float64 [N]."""
    return 100 * (unit(pictures) * unit(texts)).sum(1).clamp_min(0)


def tone_order(light: Tensor, dark: Tensor) -> Tensor:
    """1 where picture i of `light` [N, 3, H, W] uint8 is brighter than picture i of `dark`, else 0: float64 [N].

    For captions that differ in skin tone only, the mean luma of the full picture orders real OpenMoji pairs at 32 px
    correctly 331 times of 331 (99.7% under strong noise); selecting skin pixels by color fails on 3 (30%).
    """
    return (brightness(light) > brightness(dark)).double()


def brightness(images: Tensor) -> Tensor:
    """Mean Rec. 601 luma, 0 to 255, of pictures uint8 [N, 3, H, W]: float64 [N]."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double)
    return images.double().mean(dim=(2, 3)) @ weights


# ---- confidence ------------------------------------------------------------------------------------------------------


def bootstrap_weights(groups: Sequence[Hashable], resamples: int = 1000, seed: int = 0) -> Tensor:
    """How often each row is in each resample, float64 [resamples, N], with the dependent rows of a group together."""
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(len(index), (resamples, len(index)), generator=generator)
    counts = torch.zeros(resamples, len(index), dtype=torch.double)
    counts.scatter_add_(1, samples, torch.ones_like(samples, dtype=torch.double))
    return counts[:, [index[group] for group in groups]]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """One mean per resample, float64 [R], of values [N] or of M captions x N/M seeds, with weights [R, N] or [R, M]."""
    per_caption = values.double().reshape(-1, weights.shape[1]).mean(0)
    return weights.double() @ per_caption / weights.double().sum(1)


def around(value: float, resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Normal interval around the value, for metrics biased by resamples [R], which hold fewer different pictures."""
    reach = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)).item() * resampled.std().item()
    return value - reach, value + reach


def interval(resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a metric's values [R] over bootstrap resamples."""
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high
