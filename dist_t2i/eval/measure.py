"""The pass over pictures: made, damaged, judged, a chunk at a time on whichever rank; features stay, pictures do not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_t2i.data.stream.batch import caption_id
from dist_t2i.eval import metrics, references
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.ranks import ALONE, Ranks
from dist_t2i.eval.selection import Chosen
from dist_t2i.eval.skin_tones import group_of, tone_pair
from dist_t2i.utils.seeds import mix

if TYPE_CHECKING:
    from dist_t2i.inference.pipeline import TextToImage

_COPIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "real": lambda images, first: images,
    "mirrored": lambda images, first: references.mirrored(images),
    "shrunk": lambda images, first: references.shrunk(images),
    "blurred": lambda images, first: references.blurred(images),
    "noisy": references.noisy,
    "random": references.random,
}
"""Real pictures whole and damaged, by the number of the first one."""
_NEEDED = {
    "kid": ("real", "mirrored", "shrunk", "blurred", "noisy", "random"),
    "retrieval": ("real", "mirrored", "shrunk", "random"),
    "fid": ("real", "mirrored", "noisy", "random"),
    "inception-score": ("real", "random"),
    "precision-recall": ("real", "mirrored", "random"),
    "clip-score": ("real", "random"),
    "r-precision": ("real", "random"),
}
"""What a metric's floor and ceiling are made from."""
_WITH_TEXTS = ("clip-score", "r-precision")


@dataclass(frozen=True)
class Features:
    """What one judge saw of N pictures: float32, D numbers a picture."""

    fake: Tensor
    """[S, N, D], S = seeds x J captions a picture: row s * J + j holds caption j from seed s"""
    real: Mapping[str, Tensor]
    """Copy of the real pictures (`real`, `mirrored`, `noisy`, `random`, ...) -> [N, D]"""
    texts: Tensor | None
    """[J, N, D], where the judge reads texts and a metric needs them"""


@dataclass(frozen=True)
class Measured:
    """What the metrics of one split are computed from; on rank 0."""

    captions: tuple[tuple[str, ...], ...]
    """[N][J]"""
    features: Mapping[str, Features]
    """By network."""
    luma: Tensor
    """[seeds, M] mean luma of the pictures made for `prompts`"""
    real_luma: Tensor
    """[N] of the real pictures"""
    prompts: tuple[str, ...]
    """N first captions, then those of the tone pairs that are not among them."""
    pairs: tuple[tuple[str, str], ...]
    """The same caption in light and in dark skin tone."""
    reference_sha256: str
    """Hash of the real pictures as they were judged."""


def generate(model: TextToImage, captions: Sequence[str], seed: int, protocol: Protocol) -> Tensor:
    """One picture a caption, uint8 [N, 3, H, W]. Captions that differ by skin tone alone get the same noise."""
    noise_seeds = [mix(seed, caption_id(group_of(caption)), 4) for caption in captions]
    return model.sample(captions, noise_seeds, protocol.truncation)


def measure(
    model: TextToImage,
    chosen: Chosen,
    protocol: Protocol,
    judges: Mapping[str, FeatureNetwork],
    ranks: Ranks = ALONE,
    references_seen: dict[str, Tensor] | None = None,
) -> Measured | None:
    """The features that the protocol's metrics need, on rank 0; None elsewhere. Collective.

    `references_seen` keeps what the real pictures gave, for the next measurement of the same ones by the same judges. What
    the model itself sees in them is never kept: it has learned meanwhile.
    """
    wanted = _wanted(protocol, judges)
    kept = {} if references_seen is None else references_seen
    others, own = ({name: j for name, j in judges.items() if (name == "own") is mine} for mine in (False, True))
    if not kept:
        kept.update(ranks.collect(len(chosen), lambda rows: _real_chunk(model, chosen, rows, others, wanted)))
    real = dict(kept)
    if own:
        real |= ranks.collect(len(chosen), lambda rows: _real_chunk(model, chosen, rows, own, wanted))
    fake = ranks.collect(len(chosen), lambda rows: _fake_chunk(model, chosen, rows, protocol, judges, wanted))
    firsts = [row[0] for row in chosen.captions]
    pairs = sorted({pair for caption in firsts if (pair := tone_pair(caption))})
    extra = sorted({caption for pair in pairs for caption in pair} - set(firsts))
    more = ranks.collect(len(extra), lambda rows: {"luma": _luma(model, [extra[i] for i in rows], protocol)})
    if not ranks.main:
        return None
    luma = fake["luma"][:, :: len(chosen.captions[0])]  # of the first captions
    return Measured(
        captions=chosen.captions,
        features={name: _features(name, fake, real) for name in judges},
        luma=torch.cat([luma, more["luma"]] if more else [luma]).T,
        real_luma=real["luma"],
        prompts=(*firsts, *extra),
        pairs=tuple(pairs),
        reference_sha256=hashlib.sha256(real["digest"].numpy().tobytes()).hexdigest(),
    )


def _wanted(protocol: Protocol, judges: Mapping[str, FeatureNetwork]) -> dict[str, tuple[list[str], bool]]:
    """Network -> the copies of real pictures it must see, and whether it must read captions."""
    found = {}
    for name in judges:
        mine = [metric for metric, network in protocol.wanted if network == name]
        copies = [copy for copy in _COPIES if any(copy in _NEEDED[metric] for metric in mine)]
        found[name] = (copies, any(metric in _WITH_TEXTS for metric in mine))
    return found


def _real_chunk(
    model: TextToImage, chosen: Chosen, rows: range, judges: Mapping[str, FeatureNetwork], wanted: Mapping
) -> dict[str, Tensor]:
    """What the judges see of real pictures and read in their captions; rows first."""
    pictures = torch.stack([chosen.picture(row, model.image_size) for row in rows])
    digests = [hashlib.sha256(picture.contiguous().numpy().tobytes()).digest() for picture in pictures]
    found = {
        "luma": metrics.brightness(pictures),
        "digest": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
    }
    copies = {copy for name in judges for copy in wanted[name][0]}
    for copy in (name for name in _COPIES if name in copies):
        changed = _COPIES[copy](pictures, rows.start)
        for name, judge in judges.items():
            if copy in wanted[name][0]:
                found[f"{name} {copy}"] = judge(changed)
    for name, judge in judges.items():
        if wanted[name][1]:
            assert judge.embed_texts is not None, f"{name} reads no texts"
            captions = [caption for row in rows for caption in chosen.captions[row]]
            found[f"{name} texts"] = judge.embed_texts(captions).unflatten(0, (len(rows), -1))
    return found


def _fake_chunk(
    model: TextToImage,
    chosen: Chosen,
    rows: range,
    protocol: Protocol,
    judges: Mapping[str, FeatureNetwork],
    wanted: Mapping,
) -> dict[str, Tensor]:
    """What the judges see of the pictures made for these rows' captions: [n, S, ...]."""
    found: dict[str, list[Tensor]] = {}
    for seed in protocol.seeds:
        for number in range(len(chosen.captions[0])):
            pictures = generate(model, [chosen.captions[row][number] for row in rows], seed, protocol)
            found.setdefault("luma", []).append(metrics.brightness(pictures))
            for name, judge in judges.items():
                if wanted[name][0]:
                    found.setdefault(f"{name} fake", []).append(judge(pictures))
    return {name: torch.stack(parts, dim=1) for name, parts in found.items()}


def _luma(model: TextToImage, captions: Sequence[str], protocol: Protocol) -> Tensor:
    made = [metrics.brightness(generate(model, captions, seed, protocol)) for seed in protocol.seeds]
    return torch.stack(made, dim=1)


def _features(name: str, fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Features:
    texts = real.get(f"{name} texts")
    return Features(
        fake=fake[f"{name} fake"].transpose(0, 1),
        real={copy: real[f"{name} {copy}"] for copy in _COPIES if f"{name} {copy}" in real},
        texts=None if texts is None else texts.transpose(0, 1),
    )
