"""Computes features of generated and real pictures. Each rank processes chunks of pictures and keeps only features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_t2i.data.stream.batch import caption_id
from dist_t2i.eval import metrics, references
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.ranks import ALONE, Ranks
from dist_t2i.eval.selection import Selection
from dist_t2i.eval.skin_tones import group_of, tone_pair
from dist_t2i.utils.seeds import Purpose, mix

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
"""Name of a copy -> function that makes the intact or degraded copy. The function's arguments are the real pictures and
the index of the first picture, which seeds random noise."""
_NEEDED = {
    "kid": ("real", "mirrored", "shrunk", "blurred", "noisy", "random"),
    "retrieval": ("real", "mirrored", "shrunk", "random"),
    "fid": ("real", "mirrored", "noisy", "random"),
    "inception-score": ("real", "random"),
    "precision-recall": ("real", "mirrored", "random"),
    "clip-score": ("real", "random", "texts"),
    "r-precision": ("real", "random", "texts"),
    "diversity": ("real", "noisy", "again"),
    "attributes": ("real", "again"),
    "open-attributes": ("real", "again"),
    "styles": ("real",),
}
"""Metric -> the copies that the metric's floor and ceiling need. `texts` means embeddings of the captions, and `again`
means further real pictures of the same captions."""


@dataclass(frozen=True)
class Features:
    """One network's features of N pictures: float32, D numbers per picture."""

    fake: Tensor
    """[S, N, D] with S = number of seeds x J captions per picture. Row s * J + j has caption j and seed s."""
    real: Mapping[str, Tensor]
    """Copy of the real pictures (a key of `_COPIES`) -> [N, D]"""
    texts: Tensor | None
    """[J, N, D] if the network embeds texts and a metric needs embeddings, otherwise None"""
    again: Tensor | None = None
    """[N, K, D] of K further real pictures of each caption, if a metric needs them and the project renders them"""


@dataclass(frozen=True)
class Measured:
    """The inputs of the metrics of one split, on rank 0: captions [N][J], features per network, brightness."""

    captions: tuple[tuple[str, ...], ...]
    attributes: tuple[Mapping[str, Any], ...]
    """What the set says about each of the N pictures"""
    features: Mapping[str, Features]
    luma: Tensor
    """[seeds, M] mean luma of the pictures generated for `prompts`"""
    real_luma: Tensor
    """[N] mean luma of the real pictures"""
    prompts: tuple[str, ...]
    """The first caption of each of the N pictures, then the other captions of `pairs`."""
    pairs: tuple[tuple[str, str], ...]
    """Pairs of captions that differ only in skin tone: (light, dark)."""
    reference_sha256: str
    """Hash of the real pictures at the model's size."""


def generate(model: TextToImage, captions: Sequence[str], seed: int, protocol: Protocol) -> Tensor:
    """One picture per caption, uint8 [N, 3, H, W]. Captions that differ only in skin tone get the same noise."""
    noise_seeds = [mix(seed, caption_id(group_of(caption)), Purpose.EVALUATION_NOISE) for caption in captions]
    return model.sample(captions, noise_seeds, protocol.truncation)


def measure(
    model: TextToImage,
    selection: Selection,
    protocol: Protocol,
    networks: Mapping[str, FeatureNetwork],
    ranks: Ranks = ALONE,
    cache: dict[str, Tensor] | None = None,
) -> Measured | None:
    """The features that the protocol's metrics need, on rank 0; None on other ranks. Collective.

    `cache` keeps the features of the real pictures for the next call with the same selection and networks. The features
    of the model's own network are never cached, because this network changes with training.
    """
    firsts = [row[0] for row in selection.captions]
    pairs = sorted({pair for caption in firsts if (pair := tone_pair(caption))})
    extra = sorted({caption for pair in pairs for caption in pair} - set(firsts))

    def real_features(networks: Mapping[str, FeatureNetwork]) -> dict[str, Tensor]:
        return ranks.collect(len(selection), lambda rows: _real_chunk(model, selection, rows, protocol, networks))

    def fake_features(rows: range) -> dict[str, Tensor]:
        captions = list(zip(*(selection.captions[row] for row in rows), strict=True))
        return _fake_chunk(model, captions, protocol, networks)

    cache = {} if cache is None else cache
    own = {key: network for key, network in networks.items() if key == "own"}
    if not cache:
        cache.update(real_features({key: network for key, network in networks.items() if key != "own"}))
    real = cache | real_features(own) if own else cache
    fake = ranks.collect(len(selection), fake_features)
    more = ranks.collect(len(extra), lambda rows: _fake_chunk(model, [extra[rows.start : rows.stop]], protocol, {}))
    if not ranks.main:
        return None
    luma = fake["luma"][:, :: len(selection.captions[0])]  # keep the first caption of each picture
    return Measured(
        captions=selection.captions,
        attributes=selection.attributes,
        features={
            key: Features(
                fake=fake[f"{key} fake"].transpose(0, 1),
                real={copy: real[f"{key} {copy}"] for copy in _COPIES if f"{key} {copy}" in real},
                texts=real[f"{key} texts"].transpose(0, 1) if f"{key} texts" in real else None,
                again=real.get(f"{key} again"),
            )
            for key in networks
        },
        luma=torch.cat([luma, more["luma"]] if more else [luma]).T,
        real_luma=real["luma"],
        prompts=(*firsts, *extra),
        pairs=tuple(pairs),
        reference_sha256=hashlib.sha256(real["digest"].numpy().tobytes()).hexdigest(),
    )


def _real_chunk(
    model: TextToImage, selection: Selection, rows: range, protocol: Protocol, networks: Mapping[str, FeatureNetwork]
) -> dict[str, Tensor]:
    """For each of the `rows`: the features of its captions and of all copies of its real picture. Dimension 0 is the
    row."""
    pictures = torch.stack([selection.picture(row, model.image_size) for row in rows])
    digests = [list(hashlib.sha256(picture.contiguous().numpy().tobytes()).digest()) for picture in pictures]
    result = {"luma": metrics.brightness(pictures), "digest": torch.tensor(digests, dtype=torch.uint8)}
    needs = {(key, need) for metric, key in protocol.wanted if key in networks for need in _NEEDED[metric]}
    for copy, change in _COPIES.items():
        if keys := [key for key in networks if (key, copy) in needs]:
            changed = change(pictures, rows.start)
            result |= {f"{key} {copy}": networks[key](changed) for key in keys}
    for key, network in networks.items():
        if (key, "again") in needs and selection.rendered:
            again = torch.cat([selection.same_caption(row, model.image_size) for row in rows])
            result[f"{key} again"] = network(again).unflatten(0, (len(rows), -1))
        if (key, "texts") in needs:
            assert network.embed_texts is not None, f"{key} embeds no texts"
            captions = [caption for row in rows for caption in selection.captions[row]]
            result[f"{key} texts"] = network.embed_texts(captions).unflatten(0, (len(rows), -1))
    return result


def _fake_chunk(
    model: TextToImage, captions: Sequence[Sequence[str]], protocol: Protocol, networks: Mapping[str, FeatureNetwork]
) -> dict[str, Tensor]:
    """Mean luma and features, each [n, S, ...], of the pictures generated for captions [J][n]."""
    parts: dict[str, list[Tensor]] = {}
    for seed in protocol.seeds:
        for column in captions:
            pictures = generate(model, column, seed, protocol)
            parts.setdefault("luma", []).append(metrics.brightness(pictures))
            for key, network in networks.items():
                parts.setdefault(f"{key} fake", []).append(network(pictures))
    return {name: torch.stack(tensors, dim=1) for name, tensors in parts.items()}
