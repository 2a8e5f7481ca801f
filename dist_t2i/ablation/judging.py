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

import torch
from torch import Tensor

from dist_t2i import metricsfile
from dist_t2i.ablation.plan import Evaluation
from dist_t2i.eval import metrics
from dist_t2i.eval.features import FeatureNetwork, load_features
from dist_t2i.eval.protocol import PROTOCOLS, Protocol, evaluate, generate
from dist_t2i.eval.scores import Score

if TYPE_CHECKING:
    from dist_t2i.data.shards import ShardSet
    from dist_t2i.pipeline import TextToImage

FILE = "ablation.json"
OWN = "own_recall_at_1"
"""Key of the model's own opinion."""
METRICS = ("kid", "recall_at_1", "recall_at_5", "tone_order")
"""Keys of what an independent judge, or none, says."""


@dataclass(frozen=True)
class RememberingJudge(FeatureNetwork):
    """A judge that looks at the same pictures once: features are kept in a folder, by the hash of the pixels."""

    folder: Path

    @classmethod
    def of(cls, judge: FeatureNetwork, folder: Path) -> RememberingJudge:
        plain = {field.name: getattr(judge, field.name) for field in dataclasses.fields(judge)}
        return cls(**plain, folder=folder)

    def __call__(self, images: Tensor, *, batch: int = 32) -> Tensor:
        from safetensors.torch import load_file, save_file

        about = f"{self.name} {self.weights_sha256} {self.side} {tuple(images.shape)}"
        digest = hashlib.sha256(about.encode() + images.contiguous().numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest}.safetensors"
        if path.is_file():
            return load_file(path)["features"]
        found = super().__call__(images, batch=batch)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        save_file({"features": found.contiguous()}, aside)
        aside.replace(path)
        return found


def problems_of(chosen: Evaluation, decides: Sequence[str]) -> list[str]:
    """What is wrong with how an ablation is to be judged, before anything is trained."""
    problems = []
    if chosen.protocol not in PROTOCOLS:
        problems.append(f"evaluation.protocol: no {chosen.protocol!r}; there are {', '.join(PROTOCOLS)}")
    for key in decides:
        if key == OWN:
            problems.append(f"decides: {key} is the model's own opinion: every arm is its own judge there")
        elif key not in METRICS:
            problems.append(f"decides: no metric {key!r}; there are {', '.join(METRICS)}")
    if not decides:
        problems.append("decides: names no metric: a verdict needs at least one, such as recall_at_1")
    return problems


def protocol_of(chosen: Evaluation) -> Protocol:
    """The protocol that an ablation names, cut to its splits and seeds."""
    protocol = PROTOCOLS[chosen.protocol]
    return dataclasses.replace(protocol, splits=chosen.splits or protocol.splits, seeds=chosen.seeds or protocol.seeds)


class Judging:
    """Scores runs on one set by one protocol."""

    def __init__(self, data: ShardSet, protocol: Protocol, out: Path, say: Callable[[str], None]) -> None:
        self.data, self.protocol, self.out, self.say = data, protocol, out, say
        self._judge: RememberingJudge | None = None

    def scores(self, run: Path) -> dict[str, Any]:
        """As in scores.json, with the model's own opinion added: those that are kept if they are about this model, this set
        and this protocol, else new ones. Raises UserError.

        `seconds` is how long it took, `parameters` counts those of each network.
        """
        from dist_t2i.pipeline import load

        model = load(run)
        key = self._key(model)
        kept = _read(run / FILE)
        if kept.get("key") == key:
            return kept["scores"]
        self.say(f"scores of {run}")
        judge = self._loaded(model)
        started = time.monotonic()
        found = evaluate(model, self.data, self.protocol, say=lambda line: None, judge=judge)
        scores = json.loads(json.dumps(found.as_json()))  # as it will be read back
        for split, about in scores["splits"].items():
            about["scores"].append(dataclasses.asdict(own_recall(model, self.data, split, self.protocol)))
        scores["seconds"] = time.monotonic() - started
        scores["parameters"] = parameters(model)
        metricsfile.replace_text(run / FILE, json.dumps({"key": key, "scores": scores}, indent=1) + "\n")
        return scores

    def _key(self, model: TextToImage) -> dict[str, Any]:
        return {
            "weights": model.files.sha256(),
            "data": self.data.fingerprint,
            "protocol": json.loads(json.dumps(dataclasses.asdict(self.protocol))),
        }

    def _loaded(self, model: TextToImage) -> RememberingJudge:
        if self._judge is None:
            plain = load_features(self.protocol.features, model.device)
            self._judge = RememberingJudge.of(plain, self.out / "features")
        return self._judge


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


def own_recall(model: TextToImage, data: ShardSet, split: str, protocol: Protocol) -> Score:
    """How often the model's own D and S_D find a generated picture's caption first among 100 of the split.

    R-precision (Xu et al. 2018, AttnGAN, sec. 4) has this form, but is judged by a network that had no part in the
    training; this one was trained to agree. It says how well the two networks understand each other, and nothing that
    could be compared from model to model.
    """
    samples = data.samples(split)
    captions = [samples[i].captions[0] for i in range(min(protocol.max_pictures, len(samples)))]
    hits = []
    for seed in protocol.seeds:
        pictures = generate(model, captions, seed, protocol)
        nearness = model.score(as_images(pictures), captions).double()
        ranks = (nearness >= nearness.diagonal()[:, None]).sum(1) - 1
        hits.append(metrics.recall_at(1, ranks, len(captions), protocol.gallery))
    found = torch.cat(hits)
    weights = metrics.bootstrap_weights(range(len(captions)), protocol.resamples)
    low, high = metrics.interval(torch.as_tensor(metrics.weighted_mean(found, weights)))
    shown = min(protocol.gallery, len(captions))
    name = f"R@1 of {shown} captions (own D and S_D, no independent judge)"
    return Score(OWN, name, found.mean().item(), low, high, "higher", {"chance": 1 / shown})


def as_images(pictures: Tensor) -> list:
    """uint8 [N, 3, H, W] as PIL images."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures.permute(0, 2, 3, 1).contiguous().numpy()]
