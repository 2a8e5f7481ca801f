"""Near-copies: generated pictures that lie closer to a training picture than real pictures do.

A generator that is trained on few pictures can memorize them. The nearest training picture of a generated picture is
then nearer than the nearest training picture of a new real picture (Meehan et al. 2020, "A Non-Parametric Test to
Detect Data-Copying in Generative Models", whose test compares all distances; we count the small ones). Distances are 1
minus the cosine of features. Where training mirrors pictures, mirror images count as training pictures, too.

A generated picture is a near-copy if its distance is below a limit that about 1% of real pictures fall below: the 1st
percentile of the distances of training pictures to the nearest *other* training picture, or, if it is smaller, that of
held-out pictures to the nearest training picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_t2i.data.images import PictureError, decode, square
from dist_t2i.data.shard_set import BadSample, ShardSet
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.measure import Features
from dist_t2i.eval.metrics import unit

LARGEST = 2_000
"""Near-copies are counted for sets of at most this many training pictures. Their features take minutes on a CPU."""
ALARM = 0.2
"""A larger share of near-copies is worth a warning."""
RARE = 0.01
"""Share of real pictures that count as near-copies."""
_FEWEST = 100
"""A percentile of fewer held-out pictures says little, so they are not used."""
_CHUNK = 64


@dataclass
class NearCopies:
    """Counts near-copies of the pictures in the training split of `data`, at `size` pixels.

    With `mirrored`, their mirror images count as well. The features of the training pictures are kept for the next call
    with the same weights of the feature network.
    """

    data: ShardSet
    size: int
    mirrored: bool
    _features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether the set is small enough to be compared with."""
        return sum(self.data.shards("train").sizes) <= LARGEST

    def share(self, features: Features, network: FeatureNetwork) -> float:
        """The share of the generated pictures of `features`, by `network`, that are near-copies. Raises DataError."""
        if network.weights_sha256 not in self._features:
            views = [torch.cat(view) for view in zip(*self._views(network), strict=True)]
            self._features = {network.weights_sha256: torch.stack(views)}
        training = self._features[network.weights_sha256]
        limit = limit_of(training, features.real.get("real"))
        return (nearest(features.fake.flatten(0, 1), training) < limit).double().mean().item()

    def _views(self, network: FeatureNetwork) -> Iterator[list[Tensor]]:
        """Unit features [n, D] of n training pictures and, with `mirrored`, of their mirror images."""
        for pictures in self._pictures():
            yield [unit(network(view)) for view in (pictures, pictures.flip(-1))[: 1 + self.mirrored]]

    def _pictures(self) -> Iterator[Tensor]:
        """The distinct training pictures, uint8 [n, 3, size, size]; those that training cannot use are left out."""
        samples, seen, chunk = self.data.samples("train"), set(), []
        for number in range(len(samples)):
            try:
                picture = square(decode(samples[number].image_bytes, at_least=self.size), self.size)
            except (BadSample, PictureError):
                continue
            digest = hashlib.sha256(picture.contiguous().numpy().tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                chunk.append(picture)
            if len(chunk) == _CHUNK:
                yield torch.stack(chunk)
                chunk = []
        if chunk:
            yield torch.stack(chunk)


def memorizing(share: float) -> str:
    """What to do about this share of near-copies, for a warning; "" up to `ALARM`."""
    if share <= ALARM:
        return ""
    return (
        f"{share:.0%} of the generated pictures are near-copies of training pictures (of real pictures, about {RARE:.0%} "
        "are): the generator memorizes the training set. Add pictures, raise augment.*, use an earlier checkpoint, or "
        "start from a model of a larger set (train.init)"
    )


def nearest(pictures: Tensor, training: Tensor, *, others: bool = False) -> Tensor:
    """Distance of each picture, features [M, D], to the nearest of N training pictures, unit features [V, N, D] of V
    views: float64 [M]. With `others`, picture i is training picture i and is not compared with itself."""
    cosines = (unit(pictures) @ training.mT).amax(0)
    if others:
        cosines.fill_diagonal_(-1.0)
    return 1.0 - cosines.amax(1)


def limit_of(training: Tensor, held_out: Tensor | None = None) -> float:
    """The distance below which a picture is a near-copy, from features of the training pictures [V, N, D] and of the
    held-out pictures [M, D]."""
    distances = [nearest(training[0], training, others=True)]
    if held_out is not None and len(held_out) >= _FEWEST:
        distances.append(nearest(held_out, training))
    return min(torch.quantile(one, RARE).item() for one in distances)
