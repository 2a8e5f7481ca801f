"""From features to scores: each metric's value, its interval, and the floor and ceiling of its scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_t2i.eval import metrics
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.judges.torch_fidelity import torch_fidelity
from dist_t2i.eval.measure import Features, Measured
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.scores import Score
from dist_t2i.eval.skin_tones import group_of

_NAMES = {
    "real": "the real pictures",
    "mirrored": "the real pictures mirrored",
    "shrunk": "real pictures shrunk to 8 pixels",
    "blurred": "real pictures blurred",
    "noisy": "real pictures with noise",
    "random": "random pixels",
}
_HALVES = "one half of the real pictures against the other"
_PARTS = {"retrieval": ("recall-at-1", "recall-at-5"), "precision-recall": ("precision", "recall")}
"""Metrics that give several scores."""
_SPLITS = 20
"""Random halvings of the real pictures that the floor is averaged over, where a distance is cheap; otherwise 1."""


@dataclass(frozen=True)
class Case:
    """The input of one metric."""

    key: str
    """Of the network."""
    network: FeatureNetwork
    features: Features
    captions: tuple[tuple[str, ...], ...]
    protocol: Protocol
    weights: Tensor
    """Bootstrap weights of the N pictures, float64 [R, N]."""

    @property
    def real(self) -> Tensor:
        return self.features.real["real"]

    @property
    def texts(self) -> Tensor:
        assert self.features.texts is not None, f"{self.key} embedded no captions"
        return self.features.texts

    @property
    def costly_weights(self) -> Tensor:
        return self.weights[: self.protocol.costly_resamples]

    def interval(self, values: Tensor) -> tuple[float, float]:
        """Bootstrap interval of the mean of values [S, N] or [S * N]."""
        return metrics.interval(metrics.weighted_mean(values.flatten(), self.weights))

    def ends(self, distance: Callable[[Tensor], float], *copies: str) -> dict[str, float]:
        """Description -> `distance` of the features of each of these copies of the real pictures."""
        return {_NAMES[copy]: distance(self.features.real[copy]) for copy in copies}

    def score(
        self,
        metric: str,
        value: float,
        interval: tuple[float, float],
        floor: dict[str, float],
        ceiling: dict[str, float],
        name: str = "",
    ) -> Score:
        key = key_of(metric, self.key)
        return Score(
            key, name or self.network.called(metric), value, *interval, better_of(key), floor, ceiling, self.key
        )


def keys_of(protocol: Protocol) -> list[str]:
    """Machine names of the scores that a protocol may give."""
    return [
        key_of(part, network or "efficientnet-lite0")
        for metric, network in protocol.wanted
        for part in _PARTS.get(metric, (metric,))
    ]


def better_of(key: str) -> str:
    """`lower` for distances, `higher` for everything else."""
    return "lower" if key.startswith(("kid", "fid")) else "higher"


def key_of(metric: str, network: str) -> str:
    """The machine name of a score; networks other than the default one are part of it."""
    plain = metric.replace("-", "_")
    return plain if network == "efficientnet-lite0" else f"{plain}_{network.replace('-', '_')}"


def scores_of(measured: Measured, protocol: Protocol, networks: dict[str, FeatureNetwork]) -> tuple[Score, ...]:
    """The protocol's scores, in its order, without those whose network is missing."""
    groups = [group_of(row[0]) for row in measured.captions]
    weights = metrics.bootstrap_weights(groups, max(protocol.resamples, protocol.costly_resamples))
    scores: list[Score] = []
    for metric, key in protocol.wanted:
        if metric == "tone-order":
            scores += tone_scores(measured, protocol)
        elif key in networks:
            case = Case(key, networks[key], measured.features[key], measured.captions, protocol, weights)
            scores += _METRICS[metric](case)
    return tuple(scores)


def random_halves(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of two random halves."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 2], order[rows // 2 :]


def between_halves(real: Tensor, distance: Callable[[Tensor, Tensor], float], splits: int = _SPLITS) -> float:
    """Mean distance between two halves of the real pictures, over fixed random halvings."""
    parts = [random_halves(len(real), seed) for seed in range(splits)]
    return sum(distance(real[a], real[b]) for a, b in parts) / splits


# ---- distances between two sets --------------------------------------------------------------------------------------


def kid_scores(case: Case) -> list[Score]:
    """KID of generated and real pictures of the same captions, averaged over seeds; the interval is from all pairs.

    With a network that defines the published KID, the value is torch-fidelity's, over subsets.
    """
    fakes, real, scaled = case.features.fake, case.real, case.network.scaled

    def distance(a: Tensor, b: Tensor) -> float:
        return metrics.kid(a, b) if scaled else subset_kid(a, b, case.protocol)

    value = sum(distance(fake, real) for fake in fakes) / len(fakes)
    resamples = [metrics.kid_resamples(fake, real, case.weights, scaled=scaled) for fake in fakes]
    resampled = torch.stack(resamples).mean(0)
    interval = metrics.interval(resampled) if scaled else metrics.around(value, resampled)
    floor = {_HALVES: between_halves(real, distance, _SPLITS if scaled else 1)}
    floor |= case.ends(lambda copy: distance(copy, real), "mirrored")
    ceiling = case.ends(lambda copy: distance(copy, real), "noisy", "blurred", "shrunk", "random")
    return [case.score("kid", value, interval, floor, ceiling)]


def subset_kid(a: Tensor, b: Tensor, protocol: Protocol) -> float:
    """KID as published: torch-fidelity's mean over random subsets."""
    size = min(protocol.kid_subset_size, len(a), len(b))
    module = torch_fidelity("metric_kid")
    result = module.kid_features_to_metric(
        a.double(), b.double(), kid_subsets=protocol.kid_subsets, kid_subset_size=size, verbose=False
    )
    return result[module.KEY_METRIC_KID_MEAN]


def fid_scores(case: Case) -> list[Score]:
    """The Frechet distance of all generated pictures from the real ones."""
    fake, real = case.features.fake.flatten(0, 1), case.real
    value = fidelity_frechet(fake, real)
    times = len(case.features.fake)
    resampled = [metrics.frechet(fake, real, w.repeat(times), w) for w in case.costly_weights]
    floor = {_HALVES: between_halves(real, metrics.frechet, 1)}
    floor |= case.ends(lambda copy: metrics.frechet(copy, real), "mirrored")
    ceiling = case.ends(lambda copy: metrics.frechet(copy, real), "noisy", "random")
    return [case.score("fid", value, metrics.around(value, torch.tensor(resampled)), floor, ceiling)]


def fidelity_frechet(a: Tensor, b: Tensor) -> float:
    """torch-fidelity's Frechet distance of features [N, D] and [M, D], in float64."""
    module = torch_fidelity("metric_fid")
    statistics = [module.fid_features_to_statistics(x.double()) for x in (a, b)]
    return module.fid_statistics_to_metric(*statistics, verbose=False)[module.KEY_METRIC_FID]


# ---- quality and variety ---------------------------------------------------------------------------------------------


def inception_scores(case: Case) -> list[Score]:
    """The Inception Score of the generated pictures."""
    assert case.network.classifier is not None, f"{case.key} has no classes"
    classifier = case.network.classifier
    module = torch_fidelity("metric_isc")

    def score(features: Tensor) -> float:
        logits = features @ classifier.T
        return module.isc_features_to_metric(logits, case.protocol.inception_splits)[module.KEY_METRIC_ISC_MEAN]

    fakes = case.features.fake.flatten(0, 1)
    logits, value = fakes @ classifier.T, score(fakes)
    times = len(case.features.fake)
    resampled = [metrics.inception_score(logits, w.repeat(times)) for w in case.costly_weights]
    interval = metrics.around(value, torch.tensor(resampled))
    floor = {"all pictures alike": 1.0} | case.ends(score, "random")
    return [case.score("inception-score", value, interval, floor, case.ends(score, "real"))]


def precision_recall_scores(case: Case) -> list[Score]:
    """Precision and recall, averaged over seeds; each seed has as many generated pictures as there are real ones."""
    k, real, random = case.protocol.neighbours, case.real, case.features.real["random"]
    precise = torch.stack([metrics.in_manifold(fake, real, k) for fake in case.features.fake])
    recalled = torch.stack([metrics.in_manifold(real, fake, k) for fake in case.features.fake])
    a, b = random_halves(len(real), 0)
    ceiling = {_HALVES: metrics.in_manifold(real[a], real[b], k).mean().item()}
    scores = []
    for metric, hits, chance in (
        ("precision", precise, metrics.in_manifold(random, real, k)),
        ("recall", recalled, metrics.in_manifold(real, random, k)),
    ):
        floor = {_NAMES["random"]: chance.mean().item()}
        scores.append(case.score(metric, hits.mean().item(), case.interval(hits), floor, ceiling))
    return scores


# ---- agreement of pictures and captions ------------------------------------------------------------------------------


def retrieval_scores(case: Case) -> list[Score]:
    """How often a caption's real picture is among the k nearest to its generated one, for k = 1 and 5."""
    real, size, gallery = case.real, len(case.real), case.protocol.gallery
    among = min(gallery, size)
    ranks = metrics.retrieval_ranks(case.features.fake.flatten(0, 1), real)
    scores = []
    for k in (1, 5):

        def recall(features: Tensor, k: int = k) -> float:
            return metrics.recall_at(k, metrics.retrieval_ranks(features, real), size, gallery).mean().item()

        hits = metrics.recall_at(k, ranks, size, gallery)
        floor = {"chance": k / among} | case.ends(recall, "shrunk", "random")
        ceiling = case.ends(recall, "mirrored")
        name = f"R@{k} of {among} ({case.network.name})"
        scores.append(case.score(f"recall-at-{k}", hits.mean().item(), case.interval(hits), floor, ceiling, name))
    return scores


def clip_scores(case: Case) -> list[Score]:
    """100 x cosine of generated pictures and their captions."""
    texts = case.texts
    hits = torch.stack([metrics.clip_score(fake, texts[i % len(texts)]) for i, fake in enumerate(case.features.fake)])

    def score(features: Tensor) -> float:
        return metrics.clip_score(features, texts[0]).mean().item()

    wrong = metrics.clip_score(case.real, texts[0].roll(1, 0)).mean().item()
    floor = {"the real pictures with other captions": wrong} | case.ends(score, "random")
    return [case.score("clip-score", hits.mean().item(), case.interval(hits), floor, case.ends(score, "real"))]


def r_precision_scores(case: Case) -> list[Score]:
    """How often a picture is nearer to its own caption than to all mismatched ones."""
    texts, count = case.texts, case.protocol.gallery - 1
    others = [metrics.mismatched([row[j] for row in case.captions], count) for j in range(len(texts))]

    def hits(pictures: Tensor, number: int = 0) -> Tensor:
        return metrics.r_precision(pictures, texts[number], others[number])

    own = torch.stack([hits(fake, i % len(texts)) for i, fake in enumerate(case.features.fake)])
    among = others[0].shape[1] + 1
    floor = {"chance": 1 / among} | case.ends(lambda copy: hits(copy).mean().item(), "random")
    ceiling = case.ends(lambda copy: hits(copy).mean().item(), "real")
    name = case.network.called("r-precision").replace("R-precision", f"R-precision, 1 of {among}", 1)
    return [case.score("r-precision", own.mean().item(), case.interval(own), floor, ceiling, name)]


def tone_scores(measured: Measured, protocol: Protocol) -> list[Score]:
    """How often a caption in light skin tone gives a brighter picture than the same caption in dark, from one noise.

    `metrics.tone_order`, from the measured brightness.
    """
    pairs, row = measured.pairs, {caption: i for i, caption in reversed(list(enumerate(measured.prompts)))}
    if len(pairs) < 2:
        return []
    rows = torch.tensor([[row[light], row[dark]] for light, dark in pairs])
    right = torch.cat([(luma[rows[:, 0]] > luma[rows[:, 1]]).double() for luma in measured.luma])
    weights = metrics.bootstrap_weights(range(len(pairs)), protocol.resamples)
    low, high = metrics.interval(metrics.weighted_mean(right, weights))
    real = measured.real_luma
    known = rows[(rows < len(real)).all(1)]
    ceiling = {}
    if len(known):
        ceiling[_NAMES["real"]] = (real[known[:, 0]] > real[known[:, 1]]).double().mean().item()
    name = f"skin tones in order ({int(right.sum())} of {len(right)} pairs)"
    return [Score("tone_order", name, right.mean().item(), low, high, "higher", {"chance": 0.5}, ceiling)]


_METRICS: dict[str, Callable[[Case], list[Score]]] = {
    "kid": kid_scores,
    "retrieval": retrieval_scores,
    "fid": fid_scores,
    "inception-score": inception_scores,
    "precision-recall": precision_recall_scores,
    "clip-score": clip_scores,
    "r-precision": r_precision_scores,
}
