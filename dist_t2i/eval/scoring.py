"""Computes scores from features: each metric's value, its interval, and the floor and ceiling of its scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_t2i.data.stream.batch import caption_id
from dist_t2i.eval import metrics
from dist_t2i.eval.contents.scene_scores import NAMED, OPEN, named_scores, open_scores
from dist_t2i.eval.contents.style_scores import STYLES, style_scores
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.judges.torch_fidelity import torch_fidelity
from dist_t2i.eval.measure import Features, Measured
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.scores import Score
from dist_t2i.eval.selection import has_styles
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
_PARTS = {
    "retrieval": ("recall-at-1", "recall-at-5"),
    "precision-recall": ("precision", "recall"),
    "attributes": NAMED,
    "open-attributes": OPEN,
    "styles": STYLES,
}
"""Metric -> its scores, for metrics that give several scores."""
Ends = dict[str, float]
"""The floors, or the ceilings, of a metric's scale: description -> value."""


@dataclass(frozen=True)
class Case:
    """The input of one metric with one network; `weights` are the bootstrap weights [R, N] of the N pictures."""

    key: str
    network: FeatureNetwork
    features: Features
    captions: tuple[tuple[str, ...], ...]
    protocol: Protocol
    weights: Tensor
    attributes: tuple[Mapping[str, Any], ...] = ()
    """What the set says about each picture in addition to its captions."""

    @property
    def real(self) -> Tensor:
        return self.features.real["real"]

    @property
    def texts(self) -> Tensor:
        assert self.features.texts is not None, f"{self.key} embedded no captions"
        return self.features.texts

    @property
    def ids(self) -> Tensor:
        """int64 [N], equal for pictures with the same first caption."""
        return torch.tensor([caption_id(row[0]) for row in self.captions])

    @property
    def again(self) -> Tensor:
        assert self.features.again is not None, f"{self.key}: no further real pictures of the captions were rendered"
        return self.features.again

    def ends(self, distance: Callable[[Tensor], float], *copies: str) -> Ends:
        """Applies `distance` to the features of the named copies of the real pictures: description -> value."""
        return {_NAMES[copy]: distance(self.features.real[copy]) for copy in copies}

    def mean(self, metric: str, values: Tensor, floor: Ends, ceiling: Ends, name: str = "") -> Score:
        """A score that is the mean of values [S, N] or [S * N], with its bootstrap interval."""
        interval = metrics.interval(metrics.weighted_mean(values.flatten(), self.weights))
        return self.score(metric, values.mean().item(), interval, floor, ceiling, name)

    def costly(
        self, metric: str, value: float, resample: Callable[[Tensor, Tensor], float], floor: Ends, ceiling: Ends
    ) -> Score:
        """A score with few bootstrap resamples, because one resample takes seconds.

        `resample` computes the value from the weights of the generated and of the real pictures.
        """
        times, weights = len(self.features.fake), self.weights[: self.protocol.costly_resamples]
        interval = metrics.around(value, torch.tensor([resample(row.repeat(times), row) for row in weights]))
        return self.score(metric, value, interval, floor, ceiling)

    def score(
        self, metric: str, value: float, interval: tuple[float, float], floor: Ends, ceiling: Ends, name: str = ""
    ) -> Score:
        key, name = key_of(metric, self.key), name or self.network.called(metric)
        return Score(key, name, value, *interval, better_of(key), floor, ceiling, self.key)


def keys_of(protocol: Protocol) -> list[str]:
    """Machine names of the scores that a protocol may give."""
    return [
        key_of(part, network or "efficientnet-lite0")
        for metric, network in protocol.wanted
        for part in _PARTS.get(metric, (metric,))
    ]


def better_of(key: str) -> str:
    """`lower` for distances, `higher` for everything else."""
    return "lower" if key.startswith(("kid", "fid")) or key.endswith("_distance") else "higher"


def key_of(metric: str, network: str) -> str:
    """The machine name of a score. It contains the network unless this is the default network, or the metric's only one."""
    plain = metric.replace("-", "_")
    return plain if network in ("efficientnet-lite0", "scenes", "styles") else f"{plain}_{network.replace('-', '_')}"


def scores_of(measured: Measured, protocol: Protocol, networks: dict[str, FeatureNetwork]) -> tuple[Score, ...]:
    """The scores in the protocol's order. Leaves out scores whose network is not in `networks`."""
    groups = [group_of(row[0]) for row in measured.captions]
    weights = metrics.bootstrap_weights(groups, max(protocol.resamples, protocol.costly_resamples))
    scores: list[Score] = []
    for metric, key in protocol.wanted:
        if metric == "tone-order":
            scores += tone_scores(measured, protocol)
        elif key in networks:
            features = measured.features[key]
            case = Case(key, networks[key], features, measured.captions, protocol, weights, measured.attributes)
            scores += _METRICS[metric](case)
    return tuple(scores)


def kid_scores(case: Case) -> list[Score]:
    """KID between generated and real pictures of the same captions, averaged over seeds.

    For a network that defines the published KID, torch-fidelity computes the value as a mean over random subsets. The
    interval always comes from resamples that use all pairs of pictures.
    """
    fakes, real, scaled = case.features.fake, case.real, case.network.scaled

    def distance(a: Tensor, b: Tensor) -> float:
        return metrics.kid(a, b) if scaled else subset_kid(a, b, case.protocol)

    value = sum(distance(fake, real) for fake in fakes) / len(fakes)
    resamples = [metrics.kid_resamples(fake, real, case.weights, scaled=scaled) for fake in fakes]
    resampled = torch.stack(resamples).mean(0)
    interval = metrics.interval(resampled) if scaled else metrics.around(value, resampled)
    halvings = [metrics.random_halves(real, seed) for seed in range(20 if scaled else 1)]  # KID over subsets is slow
    floor = {_HALVES: sum(distance(*halves) for halves in halvings) / len(halvings)}
    floor |= case.ends(lambda copy: distance(copy, real), "mirrored")
    ceiling = case.ends(lambda copy: distance(copy, real), "noisy", "blurred", "shrunk", "random")
    return [case.score("kid", value, interval, floor, ceiling)]


def subset_kid(a: Tensor, b: Tensor, protocol: Protocol) -> float:
    """KID as published: torch-fidelity's mean over random subsets."""
    sizes = {"kid_subsets": protocol.kid_subsets, "kid_subset_size": min(protocol.kid_subset_size, len(a), len(b))}
    module = torch_fidelity("metric_kid")
    result = module.kid_features_to_metric(a.double(), b.double(), **sizes, verbose=False)
    return result[module.KEY_METRIC_KID_MEAN]


def fid_scores(case: Case) -> list[Score]:
    """The Frechet distance between all generated pictures and the real pictures."""
    fake, real = case.features.fake.flatten(0, 1), case.real
    floor = {_HALVES: metrics.frechet(*metrics.random_halves(real))}
    floor |= case.ends(lambda copy: metrics.frechet(copy, real), "mirrored")
    ceiling = case.ends(lambda copy: metrics.frechet(copy, real), "noisy", "random")
    resample = functools.partial(metrics.frechet, fake, real)
    return [case.costly("fid", fidelity_frechet(fake, real), resample, floor, ceiling)]


def fidelity_frechet(a: Tensor, b: Tensor) -> float:
    """torch-fidelity's Frechet distance of features [N, D] and [M, D], in float64."""
    module = torch_fidelity("metric_fid")
    statistics = [module.fid_features_to_statistics(x.double()) for x in (a, b)]
    return module.fid_statistics_to_metric(*statistics, verbose=False)[module.KEY_METRIC_FID]


def inception_scores(case: Case) -> list[Score]:
    """The Inception Score of the generated pictures."""
    classifier, module = case.network.classifier, torch_fidelity("metric_isc")
    assert classifier is not None, f"{case.key} has no classes"

    def score(features: Tensor) -> float:
        logits = features @ classifier.T
        return module.isc_features_to_metric(logits, case.protocol.inception_splits)[module.KEY_METRIC_ISC_MEAN]

    fakes = case.features.fake.flatten(0, 1)
    logits = fakes @ classifier.T
    floor = {"all pictures alike": 1.0} | case.ends(score, "random")

    def resample(weights: Tensor, _: Tensor) -> float:
        return metrics.inception_score(logits, weights)

    return [case.costly("inception-score", score(fakes), resample, floor, case.ends(score, "real"))]


def precision_recall_scores(case: Case) -> list[Score]:
    """Precision and recall, averaged over seeds. Each seed has equal numbers of generated and real pictures."""
    k, real, random = case.protocol.neighbours, case.real, case.features.real["random"]
    precise = torch.stack([metrics.in_manifold(fake, real, k) for fake in case.features.fake])
    recalled = torch.stack([metrics.in_manifold(real, fake, k) for fake in case.features.fake])
    ceiling = {_HALVES: metrics.in_manifold(*metrics.random_halves(real), k).mean().item()}
    chance = (metrics.in_manifold(random, real, k), metrics.in_manifold(real, random, k))
    floors = [{_NAMES["random"]: hits.mean().item()} for hits in chance]
    return [case.mean("precision", precise, floors[0], ceiling), case.mean("recall", recalled, floors[1], ceiling)]


def retrieval_scores(case: Case) -> list[Score]:
    """How often the k real pictures nearest to a generated picture include that of its caption, for k = 1 and 5."""
    real, size, gallery = case.real, len(case.real), case.protocol.gallery
    among = min(gallery, size)
    ranks = metrics.retrieval_ranks(case.features.fake.flatten(0, 1), real)
    scores = []
    for k in (1, 5):

        def recall(features: Tensor, k: int = k) -> float:
            return metrics.recall_at(k, metrics.retrieval_ranks(features, real), size, gallery).mean().item()

        hits = metrics.recall_at(k, ranks, size, gallery)
        floor = {"chance": k / among} | case.ends(recall, "shrunk", "random")
        name = f"R@{k} of {among} ({case.network.name})"
        scores.append(case.mean(f"recall-at-{k}", hits, floor, case.ends(recall, "mirrored"), name))
    return scores


def clip_scores(case: Case) -> list[Score]:
    """100 times the cosine between generated pictures and their captions."""
    texts = case.texts
    hits = torch.stack([metrics.clip_score(fake, texts[i % len(texts)]) for i, fake in enumerate(case.features.fake)])

    def score(features: Tensor) -> float:
        return metrics.clip_score(features, texts[0]).mean().item()

    wrong = metrics.clip_score(case.real, texts[0].roll(1, 0)).mean().item()
    floor = {"the real pictures with other captions": wrong} | case.ends(score, "random")
    return [case.mean("clip-score", hits, floor, case.ends(score, "real"))]


def r_precision_scores(case: Case) -> list[Score]:
    """How often a picture is nearer to its own caption than to any of its mismatched captions."""
    texts, count = case.texts, case.protocol.gallery - 1
    others = [metrics.mismatched([row[j] for row in case.captions], count) for j in range(len(texts))]

    def hits(pictures: Tensor, number: int = 0) -> Tensor:
        return metrics.r_precision(pictures, texts[number], others[number])

    own = torch.stack([hits(fake, i % len(texts)) for i, fake in enumerate(case.features.fake)])
    among = others[0].shape[1] + 1
    floor = {"chance": 1 / among} | case.ends(lambda copy: hits(copy).mean().item(), "random")
    ceiling = case.ends(lambda copy: hits(copy).mean().item(), "real")
    name = case.network.called("r-precision").replace("R-precision", f"R-precision, 1 of {among}", 1)
    return [case.mean("r-precision", own, floor, ceiling, name)]


def diversity_scores(case: Case) -> list[Score]:
    """How different pictures of one caption are: their mean distance, relative to that of real pictures of one caption.

    The distance is that of `metrics.spread`. The idea is Per-Prompt Diversity (Kobayashi et al. 2025) and the conditional
    Vendi score (Jalali et al. 2024), which also separate differences within a prompt from those between prompts. The ratio
    to real pictures is ours: it makes 1 the goal, because more variety than that of real pictures is not better.

    The real pictures of a caption are rendered, or are those of the set, if at least half of its pictures share their
    caption with another. In a set with styles, these are all pictures that there are of a caption, so that a picture is
    also compared with itself: two pictures of one caption have the same style half of the time. Otherwise the ratio is that to real pictures of different captions. Its name then says so, because
    no value of it is known to be right: a caption may decide much of a picture.
    """
    real, ids = case.real, case.ids
    fake = case.features.fake.unflatten(0, (len(case.protocol.seeds), -1)).permute(2, 1, 0, 3)  # [N, J, seeds, D]
    spread = metrics.spread(fake.flatten(0, 1)).unflatten(0, fake.shape[:2]).mean(1)
    metric, counts = "diversity", torch.ones(len(real), dtype=torch.double)
    if case.features.again is not None:
        reference = metrics.spread(case.features.again)
    else:
        same = ids[:, None] == ids
        alike = same.sum(1) > 1
        if not (case.attributes and all(has_styles(about) for about in case.attributes)):
            same.fill_diagonal_(False)
        if alike.double().mean() >= 0.5:
            counts, reference = alike.double(), metrics.mean_distance(real, real, same)
        else:
            metric, reference = "diversity-other-captions", metrics.mean_distance(real, real, ids[:, None] != ids)

    def ratio(weights: Tensor) -> Tensor:
        return (weights @ (counts * spread)) / (weights @ (counts * reference))

    whole = (counts @ reference).item()
    noisy = metrics.spread(torch.stack([real, case.features.real["noisy"]], 1))
    floor = {"one picture per caption": 0.0, "a real picture and its copy with noise": (counts @ noisy).item() / whole}
    halves = [metrics.random_halves(reference[counts > 0], seed) for seed in range(20)]
    ceiling = {_HALVES: sum((a.mean() / b.mean()).item() for a, b in halves) / len(halves)}
    value = ratio(torch.ones(1, len(real), dtype=torch.double)).item()
    return [case.score(metric, value, metrics.interval(ratio(case.weights)), floor, ceiling)]


def attribute_scores(case: Case) -> list[Score]:
    """Whether pictures show what captions name: see `contents.scene_scores.named_scores`."""
    real = torch.cat([case.real[None], case.again.transpose(0, 1)])
    return named_scores(case.features.fake, real, case.attributes, case.weights, case.key)


def open_attribute_scores(case: Case) -> list[Score]:
    """The distributions of what captions leave open: see `contents.scene_scores.open_scores`."""
    again = case.again.transpose(0, 1)
    return open_scores(case.features.fake, case.real, again, case.weights, case.protocol.costly_resamples, case.key)


def picture_style_scores(case: Case) -> list[Score]:
    """Which styles pictures have: see `contents.style_scores.style_scores`."""
    return style_scores(case.features.fake, case.real, case.ids, case.attributes, case.weights, case.key)


def tone_scores(measured: Measured, protocol: Protocol) -> list[Score]:
    """How often, for the same noise, light skin tone gives a brighter picture than dark: see `metrics.tone_order`."""
    pairs, row = measured.pairs, {caption: i for i, caption in reversed(list(enumerate(measured.prompts)))}
    if len(pairs) < 2:
        return []
    light, dark = rows = torch.tensor([[row[caption] for caption in pair] for pair in pairs]).T
    right = (measured.luma[:, light] > measured.luma[:, dark]).double().flatten()
    weights = metrics.bootstrap_weights(range(len(pairs)), protocol.resamples)
    low, high = metrics.interval(metrics.weighted_mean(right, weights))
    known = (rows < len(measured.real_luma)).all(0)
    real = measured.real_luma[light[known]] > measured.real_luma[dark[known]]
    ceiling = {_NAMES["real"]: real.double().mean().item()} if len(real) else {}
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
    "diversity": diversity_scores,
    "attributes": attribute_scores,
    "open-attributes": open_attribute_scores,
    "styles": picture_style_scores,
}
