"""Scores the runs of an ablation by an independent feature network and by the models themselves; caches the scores.

OUT/features/HASH.safetensors      features of pictures, by the hash of their pixels
OUT/ARM/seed-N/ablation.json       scores of a run, with hashes of everything that affects the scores
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dist_t2i.errors import UserError
from dist_t2i.eval.evaluate import evaluate, load_networks
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.protocol import Protocol, load_protocol
from dist_t2i.eval.scoring import keys_of
from dist_t2i.utils.files import read_json, replacing, write_atomic

if TYPE_CHECKING:
    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

FILE = "ablation.json"
OWN = "_own"
"""Suffix of the keys of scores by the model's own D and S_D."""


@dataclass(frozen=True)
class CachedFeatures(FeatureNetwork):
    """A feature network that caches features in a folder, under a hash of the pixels."""

    folder: Path = Path()

    @classmethod
    def of(cls, network: FeatureNetwork, folder: Path) -> CachedFeatures:
        plain = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
        return cls(**plain, folder=folder)

    def __call__(self, images: Tensor, *, batch: int | None = None) -> Tensor:
        from safetensors.torch import load_file, save_file

        about = f"{self.name} {self.weights_sha256} {self.side} {tuple(images.shape)}"
        digest = hashlib.sha256(about.encode() + images.contiguous().numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest}.safetensors"
        if path.is_file():
            return load_file(path)["features"]
        features = super().__call__(images, batch=batch)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file({"features": features.contiguous()}, part)
        return features


def problems_of(protocol: str, decides: Sequence[str]) -> list[str]:
    """Problems of an ablation's protocol and deciding metrics, one line per problem."""
    try:
        known = keys_of(load_protocol(protocol))
    except UserError as error:
        return [f"protocol: {error}"]
    problems = [] if decides else ["decides: must not be empty; name at least one metric, such as recall_at_1"]
    for key in decides:
        if key not in known:
            problems.append(f"decides: unknown metric {key!r}; {protocol} has {', '.join(known)}")
        elif key.endswith(OWN):
            problems.append(f"decides: {key} comes from the networks of each arm and cannot decide between arms")
    return problems


class RunScorer:
    """Scores runs on one set by one protocol."""

    def __init__(self, data: ShardSet, protocol: Protocol, out: Path, say: Callable[[str], None]) -> None:
        self.data, self.protocol, self.out, self.say = data, protocol, out, say
        self.networks: dict[str, FeatureNetwork] = {}
        """The protocol's feature networks by name, which are loaded when first used."""

    def scores(self, run: Path) -> dict[str, Any]:
        """Scores of a run as in scores.json; cached while model, set and protocol stay the same. Raises UserError.

        The result also has the keys `seconds` (duration of the scoring) and `parameters` (number of weights by
        network).
        """
        from dist_t2i.inference.pipeline import load

        model = load(run)
        key = self._key(model)
        cached = read_json(run / FILE)
        if cached.get("key") == key:
            return cached["scores"]
        self.say(f"scores of {run}")
        if not self.networks:
            loaded = load_networks(self.protocol, model.device, size=model.image_size)
            self.networks = {
                name: CachedFeatures.of(network, self.out / "features") for name, network in loaded.items()
            }
        started = time.monotonic()
        result = evaluate(model, self.data, self.protocol, say=lambda line: None, networks=self.networks)
        scores = json.loads(json.dumps(result.as_json()))  # the same types as in a cached result
        scores["seconds"] = time.monotonic() - started
        scores["parameters"] = parameters(model)
        write_atomic(run / FILE, json.dumps({"key": key, "scores": scores}, indent=1) + "\n")
        return scores

    def _key(self, model: TextToImage) -> dict[str, Any]:
        return {
            "weights": model.files.sha256(),
            "data": self.data.fingerprint,
            "protocol": self.protocol.sha256,
        }


def parameters(model: TextToImage) -> dict[str, int]:
    """Number of weights of the generator, the discriminator and all trained text encoders."""
    counts = {"generator": 0, "discriminator": 0, "text": 0}
    for name, tensor in {**model.files.generator, **model.files.discriminator}.items():  # counts a shared encoder once
        network = name.partition(".")[0]
        counts[network if network in counts else "text"] += tensor.numel()
    return counts
