"""The scores of the runs of an ablation, each computed once: an independent judge's, and the model's own opinion.

OUT/features/HASH.safetensors      what the judge saw in pictures that are asked for again, such as the real ones
OUT/ARM/seed-N/ablation.json       a run's scores, with hashes of all that they depend on
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
from dist_t2i.utils.files import replacing, write_atomic

if TYPE_CHECKING:
    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

FILE = "ablation.json"
OWN = "_own"
"""End of the keys of what the model's own D and S_D say."""


@dataclass(frozen=True)
class RememberingJudge(FeatureNetwork):
    """A judge that looks at the same pictures once: features are kept in a folder, by the hash of the pixels."""

    folder: Path = Path()

    @classmethod
    def of(cls, judge: FeatureNetwork, folder: Path) -> RememberingJudge:
        plain = {field.name: getattr(judge, field.name) for field in dataclasses.fields(judge)}
        return cls(**plain, folder=folder)

    def __call__(self, images: Tensor, *, batch: int | None = None) -> Tensor:
        from safetensors.torch import load_file, save_file

        about = f"{self.name} {self.weights_sha256} {self.side} {tuple(images.shape)}"
        digest = hashlib.sha256(about.encode() + images.contiguous().numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest}.safetensors"
        if path.is_file():
            return load_file(path)["features"]
        found = super().__call__(images, batch=batch)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file({"features": found.contiguous()}, part)
        return found


def problems_of(protocol: str, decides: Sequence[str]) -> list[str]:
    """What is wrong with how an ablation is to be judged, before anything is trained."""
    try:
        known = keys_of(load_protocol(protocol))
    except UserError as error:
        return [f"protocol: {error}"]
    problems = [] if decides else ["decides: names no metric: a verdict needs at least one, such as recall_at_1"]
    for key in decides:
        if key not in known:
            problems.append(f"decides: no metric {key!r}; {protocol} gives {', '.join(known)}")
        elif key.endswith(OWN):
            problems.append(f"decides: {key} is the model's own opinion: every arm is its own judge there")
    return problems


class Judging:
    """Scores runs on one set by one protocol."""

    def __init__(self, data: ShardSet, protocol: Protocol, out: Path, say: Callable[[str], None]) -> None:
        self.data, self.protocol, self.out, self.say = data, protocol, out, say
        self.judges: dict[str, FeatureNetwork] = {}
        """The independent ones that the protocol asks for, by network; loaded when they are first needed."""

    def scores(self, run: Path) -> dict[str, Any]:
        """As in scores.json: those that are kept if they are about this model, this set and this protocol, else new ones.
        Raises UserError. `seconds` is how long it took, `parameters` counts those of each network.
        """
        from dist_t2i.inference.pipeline import load

        model = load(run)
        key = self._key(model)
        kept = _read(run / FILE)
        if kept.get("key") == key:
            return kept["scores"]
        self.say(f"scores of {run}")
        if not self.judges:
            loaded = load_networks(self.protocol, model.device)
            self.judges = {name: RememberingJudge.of(one, self.out / "features") for name, one in loaded.items()}
        started = time.monotonic()
        found = evaluate(model, self.data, self.protocol, say=lambda line: None, networks=self.judges)
        scores = json.loads(json.dumps(found.as_json()))  # as it will be read back
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


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def parameters(model: TextToImage) -> dict[str, int]:
    """How many numbers each network has: generator, discriminator, and the trained text encoders together."""
    counted = {"generator": 0, "discriminator": 0, "text": 0}
    encoders: dict[str, int] = {}
    for tensors in (model.files.generator, model.files.discriminator):
        for name, tensor in tensors.items():
            network = name.partition(".")[0]
            if network in ("generator", "discriminator"):
                counted[network] += tensor.numel()
            else:
                encoders[name] = tensor.numel()  # a shared encoder is in both files, as `text.*`
    counted["text"] = sum(encoders.values())
    return counted


def as_images(pictures: Tensor) -> list:
    """uint8 [N, 3, H, W] as PIL images."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures.permute(0, 2, 3, 1).contiguous().numpy()]
