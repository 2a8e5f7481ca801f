"""Metrics as pure functions of features and pixels: no networks, no files, and random numbers only from given seeds.

`FeatureNetwork.called` names the scores: a metric gets its published name only with the network that defines the
metric. Bootstrap weights say how often each row counts in a resample: [N] for one resample, [R, N] for R resamples.
`interval` and `around` compute a confidence interval from the values of resamples.
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

    The estimator and the cubic kernel (x.y / D + 1)^3 are those of KID (Binkowski et al. 2018, eq. 4), computed over
    all pairs, not over subsets. Features are scaled to length sqrt(D) unless `scaled` is False. Inception features have
    about this length. EfficientNet-Lite0's features have length 16 instead of 36, so without scaling, an equal
    degradation would give a ninth of the value. The value may be negative for similar sets. Shared pictures lower the
    value further, because they are compared with their copies.
    """
    a, b = _kernel_rows(a, b, scaled)
    within = torch.cat([off_diagonal_mean(x, x, torch.ones(1, len(x), dtype=torch.double)) for x in (a, b)]).sum()
    between = sum(cubic(a[rows], b).sum() for rows in _blocks(len(a))) / (len(a) * len(b))
    return (within - 2 * between).item()


def kid_resamples(a: Tensor, b: Tensor, weights: Tensor, *, scaled: bool = True) -> Tensor:
    """`kid` of R resamples, float64 [R], from weights [R, N] and features a, b [N, D]; rows a[i], b[i] share a caption.

    A row that occurs twice in a resample is not compared with itself, so these estimates are unbiased.
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
    """KID's kernel matrix [..., N, M] of rows [..., N, D] and [..., M, D], which are already divided by sqrt(D)."""
    return (x @ y.mT + 1.0) ** 3


def off_diagonal_mean(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Mean of `cubic` over pairs of row i of x and row j of y [N, D], i != j; row i counts weights[r, i] times: [R]."""
    pairs = torch.zeros(len(weights), dtype=torch.double)
    for rows in _blocks(len(x)):  # the full kernel of 30,000 pictures would take 7 GB
        kernel, own = cubic(x[rows], y), weights[:, rows]
        pairs += ((own @ kernel) * weights).sum(1) - own**2 @ kernel.diagonal(rows.start)
    return pairs / (weights.sum(1) ** 2 - (weights**2).sum(1))


def _blocks(rows: int, size: int = 2048) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def frechet(a: Tensor, b: Tensor, weights_a: Tensor | None = None, weights_b: Tensor | None = None) -> float:
    """Frechet distance of Gaussians fitted to features a [N, D] and b [M, D] (Heusel et al. 2017, eq. 6).

    torch-fidelity computes the reported values. This function also accepts weights [N] and [M], and is faster for fewer
    rows than columns. The trace of the root of A'A B'B, a product of covariances, is the sum of the singular values of
    AB'. Fewer pictures give a larger distance, so only distances for equal numbers of pictures are comparable.
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
    """The weighted mean [D], and the centered rows X, scaled so that X'X is their covariance."""
    weights = torch.ones(len(rows), dtype=torch.double) if weights is None else weights.double()
    mean = weights @ rows / weights.sum()
    return mean, (rows - mean) * (weights / (weights.sum() - 1)).sqrt()[:, None]


def inception_score(logits: Tensor, weights: Tensor | None = None) -> float:
    """exp of the mean KL divergence of p(class | picture) from p(class) over all logits [N, C]; at least 1.

    Salimans et al. 2016, sec. 4. torch-fidelity computes the published score, the mean over ten parts of the pictures.
    """
    weights = torch.ones(len(logits), dtype=torch.double) if weights is None else weights.double()
    share, log = weights / weights.sum(), logits.double().log_softmax(1)
    marginal = share @ log.exp()
    return (share @ (log.exp() * (log - marginal.clamp_min(1e-300).log())).sum(1)).exp().item()


def in_manifold(queries: Tensor, rows: Tensor, neighbours: int = 3) -> Tensor:
    """float64 [N]: 1 for a query [N, D] whose distance to some row [M, D] is at most the row's radius, otherwise 0.

    A row's radius is the distance to the row's k-th nearest neighbor (Kynkaanniemi et al. 2019, sec. 3). For precision,
    the queries are generated and the rows are real; recall swaps these roles. torch-fidelity gives the same result.
    """
    queries, rows = queries.float(), rows.float()
    neighbours = min(neighbours, len(rows) - 1)
    radii = torch.cat([torch.cdist(rows[part], rows).kthvalue(neighbours + 1).values for part in _blocks(len(rows))])
    return torch.cat([(torch.cdist(queries[p], rows) <= radii).any(1) for p in _blocks(len(queries))]).double()


def random_halves(rows: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits rows into two random halves."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest difference of the distribution functions of samples [N] and [M], 0 to 1; 1 if a sample is empty."""
    if not (len(a) and len(b)):
        return 1.0
    points = torch.cat([a, b]).sort().values
    shares = [torch.searchsorted(x.sort().values, points, right=True).double() / len(x) for x in (a, b)]
    return (shares[0] - shares[1]).abs().max().item()


# ---- diversity -------------------------------------------------------------------------------------------------------


def spread(groups: Tensor) -> Tensor:
    """Mean distance of two of the K rows of each group [N, K, D], K >= 2, after scaling to length one: float64 [N]."""
    others = ~torch.eye(groups.shape[1], dtype=torch.bool)
    return torch.stack([mean_distance(rows, rows, others).mean() for rows in groups])


def mean_distance(a: Tensor, b: Tensor, pairs: Tensor) -> Tensor:
    """Mean distance of each row of a [N, D] from the rows of b [M, D] that `pairs` (bool [N, M]) selects: float64 [N].

    Rows are scaled to length one, as for KID. The distance is Euclidean. The result is 0 for a row without pairs.
    """
    a, b, pairs = unit(a), unit(b), pairs.double()
    sums = [((2 - 2 * a[rows] @ b.T).clamp_min(0).sqrt() * pairs[rows]).sum(1) for rows in _blocks(len(a))]
    return torch.cat(sums) / pairs.sum(1).clamp_min(1)


# ---- agreement of pictures and captions ------------------------------------------------------------------------------


def retrieval_ranks(queries: Tensor, pictures: Tensor) -> Tensor:
    """The rank of picture i % M [M, D] for query i [N, D] by cosine, 0 for the nearest picture: int64 [N].

    Ties count against the query, so a network that gives all pictures the same features gets the worst rank. If
    pictures have several queries, `queries` holds the first query of every picture, then the second of every picture.
    """
    nearness = unit(queries) @ unit(pictures).T
    true = nearness.gather(1, (torch.arange(len(queries)) % len(pictures))[:, None])
    return (nearness >= true).sum(1) - 1


def unit(rows: Tensor) -> Tensor:
    """Rows [N, D] scaled to length one, in float64; a row of zeros remains zero."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def recall_at(k: int, ranks: Tensor, pictures: int, gallery: int = 100) -> Tensor:
    """For each query, the probability that its picture is among the first `k` of a random gallery: float64 [N].

    A gallery consists of the true picture and `gallery` - 1 other pictures, or of all pictures if the set is smaller.
    The true picture is among the first k if the gallery contains fewer than k of the `rank` pictures that are nearer to
    the query. This probability is hypergeometric.
    """
    others, sampled = pictures - 1, min(gallery, pictures) - 1
    total = math.comb(others, sampled)
    table = [
        sum(math.comb(rank, j) * math.comb(others - rank, sampled - j) for j in range(min(k, sampled + 1))) / total
        for rank in range(pictures)
    ]
    return torch.tensor(table, dtype=torch.double)[ranks]


def mismatched(captions: Sequence[str], count: int = 99) -> Tensor:
    """For each caption, the rows of `count` other captions, or of all others if there are fewer: int64 [N, count].

    The rule is fixed, so that scores stay comparable: rows follow torch's random permutation, seeded by the hash of the
    caption. Rows whose caption equals, up to case and spacing, the given caption or that of an earlier row are skipped.
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
    """float64: 1 if text i is nearer to picture i than texts[others[i]], otherwise 0 (Xu et al. 2018, sec. 4, R =
    1)."""
    if not others.shape[1]:
        return torch.ones(len(pictures), dtype=torch.double)
    pictures, texts = unit(pictures), unit(texts)
    own = (pictures * texts).sum(1)
    parts = [torch.einsum("nd,nkd->nk", pictures[p], texts[others[p]]).amax(1) for p in _blocks(len(pictures), 256)]
    return (own > torch.cat(parts)).double()


def clip_score(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore (Hessel et al. 2021, eq. 1) with w = 100, not 2.5: max(100 x cosine of rows i, 0), float64 [N]."""
    return 100 * (unit(pictures) * unit(texts)).sum(1).clamp_min(0)


def tone_order(light: Tensor, dark: Tensor) -> Tensor:
    """float64 [N]: 1 if picture i of `light` (uint8 [N, 3, H, W]) is brighter than picture i of `dark`, otherwise 0.

    The captions of a pair differ only in skin tone. At 32 px, the mean luma of the full picture gives the right order
    for all 331 real OpenMoji pairs (with strong noise: for 99.7%). The mean luma of the pixels with skin colors gives
    the wrong order for 3 pairs (with strong noise: for 30%).
    """
    return (brightness(light) > brightness(dark)).double()


def brightness(images: Tensor) -> Tensor:
    """Mean Rec. 601 luma, 0 to 255, of pictures uint8 [N, 3, H, W]: float64 [N]."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double)
    return images.double().mean(dim=(2, 3)) @ weights


# ---- confidence ------------------------------------------------------------------------------------------------------


def bootstrap_weights(groups: Sequence[Hashable], resamples: int = 1000, seed: int = 0) -> Tensor:
    """How many times each row occurs in each resample: float64 [resamples, N]. A group is resampled as a whole."""
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(len(index), (resamples, len(index)), generator=generator)
    counts = torch.zeros(resamples, len(index), dtype=torch.double)
    counts.scatter_add_(1, samples, torch.ones_like(samples, dtype=torch.double))
    return counts[:, [index[group] for group in groups]]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of each resample: float64 [R].

    For weights [R, M], `values` [M] has one value per caption, or `values` [S * M] one per caption for each of S seeds.
    """
    per_caption = values.double().reshape(-1, weights.shape[1]).mean(0)
    return weights.double() @ per_caption / weights.double().sum(1)


def around(value: float, resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Normal interval around `value` with the spread of the resampled values [R].

    Used for metrics that the smaller number of distinct pictures in a resample would bias.
    """
    reach = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)).item() * resampled.std().item()
    return value - reach, value + reach


def interval(resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a metric's values [R] over bootstrap resamples."""
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high
