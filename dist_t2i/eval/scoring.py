"""From features to scores: each metric's value, its interval, and the two ends of its scale."""

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
_CUTS = 20
"""Ways to cut the real pictures in two that the floor is averaged over; 1 where a value takes seconds."""


@dataclass(frozen=True)
class Case:
    """What a metric is computed from."""

    network: str
    judge: FeatureNetwork
    features: Features
    captions: tuple[tuple[str, ...], ...]
    protocol: Protocol
    weights: Tensor
    """Bootstrap weights of the N pictures, float64 [R, N]."""

    @property
    def real(self) -> Tensor:
        return self.features.real["real"]

    @property
    def costly_weights(self) -> Tensor:
        return self.weights[: self.protocol.costly_resamples]

    def score(
        self,
        metric: str,
        value: float,
        ends: tuple[float, float],
        floor: dict[str, float],
        ceiling: dict[str, float],
        name: str = "",
    ) -> Score:
        low, high = ends
        name = name or self.judge.called(metric)
        key = key_of(metric, self.network)
        return Score(key, name, value, low, high, better_of(key), floor, ceiling, self.network)


def keys_of(protocol: Protocol) -> list[str]:
    """Machine names of the scores that a protocol may give."""
    found = []
    for metric, network in protocol.wanted:
        found += [key_of(part, network or "efficientnet-lite0") for part in _PARTS.get(metric, (metric,))]
    return found


def better_of(key: str) -> str:
    """`lower` for distances, `higher` for everything else."""
    return "lower" if key.startswith(("kid", "fid")) else "higher"


def key_of(metric: str, network: str) -> str:
    """The machine name of a score: plain for the offline judge, with the network for others."""
    plain = metric.replace("-", "_")
    return plain if network == "efficientnet-lite0" else f"{plain}_{network.replace('-', '_')}"


def scores_of(measured: Measured, protocol: Protocol, judges: dict[str, FeatureNetwork]) -> tuple[Score, ...]:
    """All that the protocol asks for and a judge is there for, in its order."""
    groups = [group_of(row[0]) for row in measured.captions]
    weights = metrics.bootstrap_weights(groups, max(protocol.resamples, protocol.costly_resamples))
    found: list[Score] = []
    for metric, network in protocol.wanted:
        if metric == "tone-order":
            found += tone_scores(measured, protocol)
        elif network in judges:
            case = Case(network, judges[network], measured.features[network], measured.captions, protocol, weights)
            found += _METRICS[metric](case)
    return tuple(found)


def cut_in_two(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of two halves, drawn by seed."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 2], order[rows // 2 :]


def halves(real: Tensor, distance: Callable[[Tensor, Tensor], float], cuts: int = _CUTS) -> float:
    """Mean distance of one half of the real pictures from the other, over fixed ways to cut them."""
    parts = [cut_in_two(len(real), seed) for seed in range(cuts)]
    return sum(distance(real[a], real[b]) for a, b in parts) / cuts


# ---- distances between two sets --------------------------------------------------------------------------------------


def kid_scores(case: Case) -> list[Score]:
    """KID of the pictures against the real ones of the same captions, the mean over seeds; the interval from all pairs.

    Under a judge that the published KID is defined by it is torch-fidelity's, over subsets.
    """
    fakes, real, scaled = case.features.fake, case.real, case.judge.scaled

    def distance(a: Tensor, b: Tensor) -> float:
        return float(metrics.kid(a, b)) if scaled else subset_kid(a, b, case.protocol)

    value = sum(distance(fake, real) for fake in fakes) / len(fakes)
    resampled = torch.stack([metrics.kid(fake, real, case.weights, scaled=scaled) for fake in fakes]).mean(0)
    ends = metrics.interval(resampled) if scaled else metrics.around(value, resampled)
    floor = {_HALVES: halves(real, distance, _CUTS if scaled else 1)}
    floor |= {_NAMES[copy]: distance(case.features.real[copy], real) for copy in ("mirrored",)}
    ceiling = {_NAMES[c]: distance(case.features.real[c], real) for c in ("noisy", "blurred", "shrunk", "random")}
    return [case.score("kid", value, ends, floor, ceiling)]


def subset_kid(a: Tensor, b: Tensor, protocol: Protocol) -> float:
    """KID as published: the mean over subsets, drawn by torch-fidelity from its seed."""
    size = min(protocol.kid_subset_size, len(a), len(b))
    module = torch_fidelity("metric_kid")
    found = module.kid_features_to_metric(
        a.double(), b.double(), kid_subsets=protocol.kid_subsets, kid_subset_size=size, verbose=False
    )
    return found[module.KEY_METRIC_KID_MEAN]


def fid_scores(case: Case) -> list[Score]:
    """The Frechet distance of all pictures from the real ones."""
    fake, real = case.features.fake.flatten(0, 1), case.real
    value = fidelity_frechet(fake, real)
    times = len(case.features.fake)
    resampled = [metrics.frechet(fake, real, w.repeat(times), w) for w in case.costly_weights]
    floor = {_HALVES: halves(real, metrics.frechet, 1)}
    floor |= {_NAMES["mirrored"]: metrics.frechet(case.features.real["mirrored"], real)}
    ceiling = {_NAMES[copy]: metrics.frechet(case.features.real[copy], real) for copy in ("noisy", "random")}
    return [case.score("fid", value, metrics.around(value, torch.tensor(resampled)), floor, ceiling)]


def fidelity_frechet(a: Tensor, b: Tensor) -> float:
    """torch-fidelity's Frechet distance of features [N, D] and [M, D], in float64."""
    module = torch_fidelity("metric_fid")
    statistics = [module.fid_features_to_statistics(x.double()) for x in (a, b)]
    return module.fid_statistics_to_metric(*statistics, verbose=False)[module.KEY_METRIC_FID]


# ---- one set by itself -----------------------------------------------------------------------------------------------


def inception_scores(case: Case) -> list[Score]:
    """The Inception Score of the pictures, beside that of the real ones."""
    assert case.judge.classifier is not None, f"{case.network} has no classes"
    classifier = case.judge.classifier
    module = torch_fidelity("metric_isc")

    def score(features: Tensor) -> float:
        logits = features @ classifier.T
        return module.isc_features_to_metric(logits, case.protocol.inception_splits)[module.KEY_METRIC_ISC_MEAN]

    fakes = case.features.fake
    logits = fakes.flatten(0, 1) @ classifier.T
    value = score(fakes.flatten(0, 1))
    resampled = [metrics.inception_score(logits, w.repeat(len(fakes))) for w in case.costly_weights]
    floor = {"all pictures alike": 1.0, _NAMES["random"]: score(case.features.real["random"])}
    ceiling = {_NAMES["real"]: score(case.real)}
    ends = metrics.around(value, torch.tensor(resampled))
    return [case.score("inception-score", value, ends, floor, ceiling)]


def precision_recall_scores(case: Case) -> list[Score]:
    """Precision and recall of the pictures, the mean over seeds; each seed has as many pictures as the real side."""
    k, real, weights = case.protocol.neighbours, case.real, case.weights
    inside = torch.stack([metrics.in_manifold(fake, real, k) for fake in case.features.fake])
    reached = torch.stack([metrics.in_manifold(real, fake, k) for fake in case.features.fake])
    random = case.features.real["random"]
    a, b = cut_in_two(len(real), 0)
    ceiling = {_HALVES: metrics.in_manifold(real[a], real[b], k).mean().item()}
    found = []
    for metric, hits, low in (
        ("precision", inside, metrics.in_manifold(random, real, k)),
        ("recall", reached, metrics.in_manifold(real, random, k)),
    ):
        ends = metrics.interval(metrics.weighted_mean(hits.flatten(), weights))
        floor = {_NAMES["random"]: low.mean().item()}
        found.append(case.score(metric, hits.mean().item(), ends, floor, ceiling))
    return found


# ---- does the picture fit the caption? -------------------------------------------------------------------------------


def retrieval_scores(case: Case) -> list[Score]:
    """How often the picture that a caption belongs to is among the k nearest to the made one, for k = 1 and 5."""
    real, size, gallery = case.real, len(case.real), case.protocol.gallery
    shown = min(gallery, size)
    ranks = metrics.retrieval_ranks(case.features.fake.flatten(0, 1), real)
    ends = {copy: metrics.retrieval_ranks(case.features.real[copy], real) for copy in ("mirrored", "shrunk", "random")}
    found = []
    for k in (1, 5):

        def hits(ranks: Tensor, k: int = k) -> Tensor:
            return metrics.recall_at(k, ranks, size, gallery)

        per_query = hits(ranks)
        low, high = metrics.interval(metrics.weighted_mean(per_query, case.weights))
        floor = {"chance": k / shown} | {_NAMES[copy]: hits(ends[copy]).mean().item() for copy in ("shrunk", "random")}
        ceiling = {_NAMES["mirrored"]: hits(ends["mirrored"]).mean().item()}
        name = f"R@{k} of {shown} ({case.judge.name})"
        value = per_query.mean().item()
        found.append(case.score(f"recall-at-{k}", value, (low, high), floor, ceiling, name))
    return found


def clip_scores(case: Case) -> list[Score]:
    """How near the pictures are to their captions."""
    texts = _texts(case)
    hits = torch.stack([metrics.clip_score(fake, texts[i % len(texts)]) for i, fake in enumerate(case.features.fake)])
    ends = metrics.interval(metrics.weighted_mean(hits.flatten(), case.weights))
    wrong = texts[0].roll(1, 0)
    floor = {
        "the real pictures with other captions": metrics.clip_score(case.real, wrong).mean().item(),
        _NAMES["random"]: metrics.clip_score(case.features.real["random"], texts[0]).mean().item(),
    }
    ceiling = {_NAMES["real"]: metrics.clip_score(case.real, texts[0]).mean().item()}
    return [case.score("clip-score", hits.mean().item(), ends, floor, ceiling)]


def r_precision_scores(case: Case) -> list[Score]:
    """How often a picture is nearer to its own caption than to all of the mismatched ones."""
    texts = _texts(case)
    per_picture = len(texts)
    others = [
        metrics.mismatched([row[j] for row in case.captions], case.protocol.gallery - 1) for j in range(per_picture)
    ]

    def hits(pictures: Tensor, number: int) -> Tensor:
        return metrics.r_precision(pictures, texts[number], others[number])

    found = torch.stack([hits(fake, i % per_picture) for i, fake in enumerate(case.features.fake)])
    ends = metrics.interval(metrics.weighted_mean(found.flatten(), case.weights))
    shown = others[0].shape[1] + 1
    floor = {"chance": 1 / shown, _NAMES["random"]: hits(case.features.real["random"], 0).mean().item()}
    ceiling = {_NAMES["real"]: hits(case.real, 0).mean().item()}
    name = case.judge.called("r-precision").replace("R-precision", f"R-precision, 1 of {shown}", 1)
    return [case.score("r-precision", found.mean().item(), ends, floor, ceiling, name)]


def _texts(case: Case) -> Tensor:
    assert case.features.texts is not None, f"{case.network} read no captions"
    return case.features.texts


def tone_scores(measured: Measured, protocol: Protocol) -> list[Score]:
    """How often a caption in light skin tone comes out brighter than the same one in dark, from the same noise.

    As `metrics.tone_order` has it, from the brightness of pictures that are gone.
    """
    pairs, row = measured.pairs, {caption: i for i, caption in reversed(list(enumerate(measured.prompts)))}
    if len(pairs) < 2:
        return []
    rows = torch.tensor([[row[light], row[dark]] for light, dark in pairs])
    right = torch.cat([(made[rows[:, 0]] > made[rows[:, 1]]).double() for made in measured.luma])
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
