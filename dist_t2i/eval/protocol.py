"""Evaluation protocols: fixed rules from a model and a set to scores that can be compared.

A protocol fixes captions, seeds, judge and truncation; `evaluate` follows it and writes down, in the manifest, all
that the numbers depend on. Change a protocol's rules and you must change its version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_t2i.data.batch import caption_id
from dist_t2i.data.decode import decode, square
from dist_t2i.draws import mix
from dist_t2i.errors import UserError
from dist_t2i.eval import metrics, references
from dist_t2i.eval.features import FeatureNetwork, load_features
from dist_t2i.eval.scores import Score, Scores, SplitScores

if TYPE_CHECKING:
    from dist_t2i.data.shards import ShardSet
    from dist_t2i.pipeline import TextToImage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Protocol:
    """The rules of an evaluation."""

    name: str
    version: int = 1
    splits: tuple[str, ...] = ()
    """Empty: every split of the set whose name begins with `test`."""
    features: str = "efficientnet-lite0"
    """The judge, by its key in `features.NETWORKS`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """One picture per caption and seed. KID is taken within each seed and averaged, as are the others."""
    truncation: float | None = None
    """Factor on the noise; None: the configuration's."""
    gallery: int = 100
    """Pictures among which the true one is looked for."""
    max_pictures: int = 2_000
    """Of a larger split, its first ones (a set's shards are in the order of a hash)."""
    resamples: int = 1_000
    """Bootstrap resamples for the intervals."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("openmoji", splits=("test-combinations", "test-nouns")),
        Protocol("held-out"),
        Protocol("quick", seeds=(0,), max_pictures=200),
    )
}
"""By name. Each uses the first caption of each picture, EMA weights, and the whole picture at the model's size."""


def protocol_for(data: ShardSet) -> Protocol:
    """The protocol that fits a set: `openmoji` if it has those splits, else `held-out`."""
    fits = set(PROTOCOLS["openmoji"].splits) <= set(data.splits)
    return PROTOCOLS["openmoji" if fits else "held-out"]


def evaluate(
    model: TextToImage, data: ShardSet, protocol: Protocol, *, say: Say = print, judge: FeatureNetwork | None = None
) -> Scores:
    """The scores of a model on the held-out splits of a set; `say` gets a line of progress now and then.

    Raises UserError when the set has no such split, or one with too few pictures. Takes about 0.1 s a picture and
    seed on one core at 32 px, nearly all of it in the judge.
    """
    splits = protocol.splits or tuple(name for name in data.splits if name.startswith("test"))
    missing = [name for name in splits if name not in data.splits]
    if missing or not splits:
        wanted = ", ".join(missing) or "whose name begins with test"
        raise UserError(f"{data.folder} has no split {wanted}; it has {', '.join(data.splits)}")
    judge = judge or load_features(protocol.features, model.device)
    found = {split: _evaluate_split(model, data, split, protocol, judge, say) for split in splits}
    return Scores(dataclasses.asdict(protocol), manifest(model, data, protocol, judge), found)


def _evaluate_split(
    model: TextToImage, data: ShardSet, split: str, protocol: Protocol, judge: FeatureNetwork, say: Say
) -> SplitScores:
    captions, real = real_pictures(data, split, model.image_size, protocol.max_pictures)
    if len(captions) < 4:
        raise UserError(f"{data.folder}: {split} has {len(captions)} pictures, too few to compare; hold out more")
    say(f"{split}: {len(captions)} captions x {len(protocol.seeds)} seeds, judged by {judge.name}")
    pairs = sorted({pair for caption in captions if (pair := metrics.tone_pair(caption))})
    prompts = captions + sorted({caption for pair in pairs for caption in pair} - set(captions))
    drawn = torch.stack([generate(model, prompts, seed, protocol) for seed in protocol.seeds])
    fake = drawn[:, : len(captions)]
    fakes = judge(fake.flatten(0, 1)).unflatten(0, fake.shape[:2])
    say(f"{split}: real pictures, whole and damaged, for floor and ceiling")
    weights = metrics.bootstrap_weights([group_of(caption) for caption in captions], protocol.resamples)
    reals = References.of(real, judge)
    scores = [kid_score(fakes, reals, weights, judge.name)]
    scores += [recall_score(k, fakes, reals, weights, protocol.gallery, judge.name) for k in (1, 5)]
    if len(pairs) > 1:
        row = {caption: i for i, caption in enumerate(prompts)}
        rows = torch.tensor([[row[light], row[dark]] for light, dark in pairs])
        scores.append(tone_score(drawn, real, rows, protocol.resamples))
    return SplitScores(len(captions), tuple(scores))


# ---- pictures --------------------------------------------------------------------------------------------------------


def real_pictures(data: ShardSet, split: str, size: int, limit: int) -> tuple[list[str], Tensor]:
    """First captions and pictures, uint8 [N, 3, size, size], of the first `limit` samples of a split."""
    samples = data.samples(split)
    chosen = [samples[i] for i in range(min(limit, len(samples)))]
    if not chosen:
        return [], torch.empty(0, 3, size, size, dtype=torch.uint8)
    pictures = [square(decode(sample.image_bytes, at_least=size), size) for sample in chosen]
    return [sample.captions[0] for sample in chosen], torch.stack(pictures)


def group_of(caption: str) -> str:
    """What a caption shares its noise and its bootstrap draw with: the same one in another skin tone."""
    pair = metrics.tone_pair(caption)
    return pair[0] if pair else caption


def generate(model: TextToImage, captions: Sequence[str], seed: int, protocol: Protocol) -> Tensor:
    """One picture a caption, uint8 [N, 3, H, W]. Captions that differ by skin tone alone get the same noise."""
    noise_seeds = [mix(seed, caption_id(group_of(caption)), 4) for caption in captions]
    return model.sample(captions, noise_seeds, protocol.truncation)


# ---- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """Features of the real pictures and of their damaged copies, float32 [N, D] each."""

    real: Tensor
    mirrored: Tensor
    shrunk: Tensor
    blurred: Tensor
    noisy: Tensor
    halves: tuple[tuple[Tensor, Tensor], ...]
    """Fixed ways to cut the pictures in two, as row numbers."""

    @classmethod
    def of(cls, pictures: Tensor, judge: FeatureNetwork, cuts: int = 20) -> References:
        changes = (references.mirrored, references.shrunk, references.blurred, references.noisy)
        halves = tuple(cut_in_two(len(pictures), seed) for seed in range(cuts))
        return cls(judge(pictures), *(judge(change(pictures)) for change in changes), halves)


def cut_in_two(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of two halves, drawn by seed."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 2], order[rows // 2 :]


def kid_score(fakes: Tensor, reals: References, weights: Tensor, judge: str) -> Score:
    """KID of fakes [S, N, D] against the real pictures of the same captions, the mean over S seeds."""
    value = sum(metrics.kid(fake, reals.real) for fake in fakes) / len(fakes)
    low, high = metrics.interval(torch.stack([metrics.kid(fake, reals.real, weights) for fake in fakes]).mean(0))
    halves = [metrics.kid(reals.real[a], reals.real[b]) for a, b in reals.halves]
    floor = {
        "one half of the real pictures against the other": sum(halves) / len(halves),
        "the real pictures mirrored": metrics.kid(reals.mirrored, reals.real),
    }
    ceiling = {
        "real pictures with noise": metrics.kid(reals.noisy, reals.real),
        "real pictures blurred": metrics.kid(reals.blurred, reals.real),
        "real pictures shrunk to 8 pixels": metrics.kid(reals.shrunk, reals.real),
    }
    return Score("kid", f"KID ({judge})", value, low, high, "lower", floor, ceiling)


def recall_score(k: int, fakes: Tensor, reals: References, weights: Tensor, gallery: int, judge: str) -> Score:
    """How often the picture that a caption belongs to is among the k nearest to the generated one, of `gallery`."""
    size = len(reals.real)

    def hits(queries: Tensor) -> Tensor:
        return metrics.recall_at(k, metrics.retrieval_ranks(queries, reals.real), size, gallery)

    per_query = hits(fakes.flatten(0, 1))
    low, high = metrics.interval(metrics.weighted_mean(per_query, weights))
    shown = min(gallery, size)
    floor = {"chance": k / shown, "real pictures shrunk to 8 pixels": hits(reals.shrunk).mean().item()}
    ceiling = {"the real pictures mirrored": hits(reals.mirrored).mean().item()}
    name = f"R@{k} of {shown} ({judge})"
    return Score(f"recall_at_{k}", name, per_query.mean().item(), low, high, "higher", floor, ceiling)


def tone_score(drawn: Tensor, real: Tensor, pairs: Tensor, resamples: int) -> Score:
    """How often a caption in light skin tone comes out brighter than the same one in dark, from the same noise.

    drawn uint8 [S, M, 3, H, W] for S seeds; pairs int64 [P, 2]: the rows of each pair, light first. Rows of `real`
    [N, 3, H, W] are the first N of M.
    """
    right = torch.cat([metrics.tone_order(pictures[pairs[:, 0]], pictures[pairs[:, 1]]) for pictures in drawn])
    weights = metrics.bootstrap_weights(range(len(pairs)), resamples)
    low, high = metrics.interval(metrics.weighted_mean(right, weights))
    known = pairs[(pairs < len(real)).all(1)]
    ceiling = {}
    if len(known):
        ceiling["the real pictures"] = metrics.tone_order(real[known[:, 0]], real[known[:, 1]]).mean().item()
    name = f"skin tones in order ({int(right.sum())} of {len(right)} pairs)"
    return Score("tone_order", name, right.mean().item(), low, high, "higher", {"chance": 0.5}, ceiling)


# ---- what the numbers depend on --------------------------------------------------------------------------------------


def manifest(model: TextToImage, data: ShardSet, protocol: Protocol, judge: FeatureNetwork) -> dict[str, Any]:
    """Hashes and versions that two scores must share (but for the weights) to be compared."""
    from dist_t2i import environment

    about = environment.describe()
    rules = json.dumps(dataclasses.asdict(protocol), sort_keys=True)
    return {
        "weights_sha256": model.files.sha256(),
        "images_seen": model.images_seen,
        "image_size": model.image_size,
        "data_fingerprint": data.fingerprint,
        "protocol_sha256": hashlib.sha256(rules.encode()).hexdigest(),
        "judge": {"name": judge.name, "weights_sha256": judge.weights_sha256, "side": judge.side},
        "packages": about["packages"],
        "code": about["code"],
        "device": str(model.device),
    }
