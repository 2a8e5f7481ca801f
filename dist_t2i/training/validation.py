"""Scores during training: a small evaluation protocol scores the moving average, and the best checkpoint is kept.

At N images seen, the scores are those that `tools/evaluate.py` computes for the checkpoint at N images. Rank 0 computes
the scores. The scores do not affect training, because the weights are copied and the random state is separate.

    RUN/evaluations/images-000123456.json    scores with their manifest
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_t2i.checkpoint.store import folder_name
from dist_t2i.config.sections import DataConfig, EvalConfig, TrainConfig
from dist_t2i.data.open_data import open_entry, storage_options
from dist_t2i.data.shard_set import ShardSet
from dist_t2i.errors import UserError
from dist_t2i.eval.evaluate import evaluate, load_networks, select_all
from dist_t2i.eval.judges.features import own_network
from dist_t2i.eval.measure import Measured
from dist_t2i.eval.protocol import Protocol, load_protocol
from dist_t2i.eval.scoring import better_of, keys_of
from dist_t2i.eval.studies.near_copies import NearCopies, memorizing
from dist_t2i.inference.model_files import ModelFiles
from dist_t2i.inference.pipeline import TextToImage
from dist_t2i.training.schedule import passes

FOLDER = "evaluations"
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Best:
    """The best value of `eval.metric` so far."""

    images: int
    value: float


def read_protocol(config: EvalConfig) -> Protocol:
    """The protocol `eval.protocol`. Raises UserError if the protocol is unknown or cannot be used in training."""
    protocol = load_protocol(config.protocol)
    if config.metric not in (known := keys_of(protocol)):
        problem = f"protocol {protocol.name} has no score {config.metric!r}; it has {', '.join(known)}"
        raise UserError(f"eval.metric: {problem}")
    if not protocol.ema:
        raise UserError(f"eval.protocol: {protocol.name} has `ema: false`, but training scores the moving average")
    return protocol


@dataclass(eq=False)
class Validation:
    """Every rank has a `Validation`. Only rank 0 calls `prepare` and `scores`; all ranks call the other methods."""

    folder: Path  # of the run
    config: EvalConfig
    protocol: Protocol
    train: TrainConfig
    data: ShardSet  # the training set
    device: torch.device
    warn: Callable[[str], None]
    best: Best | None = None
    _previous_best: Best | None = None
    _evaluated_at: int = 0

    def prepare(self, data: DataConfig, model_files: Callable[[Weights, Weights, int], ModelFiles]) -> None:
        """Read the held-out pictures and load the networks of the metrics. Raises UserError.

        `model_files(generator, discriminator, images)` returns the model with these weights of both networks.
        """
        self._model_files = model_files
        copies = NearCopies(self.data, data.image_size, mirrored=data.flip)
        self._copies = copies if copies.small else None
        if self.config.data:
            self.data = open_entry(self.config.data, storage_options(data))
        selections = select_all(self.data, self.protocol)
        self._selections = {split: rows.loaded(data.image_size) for split, rows in selections.items()}
        self._networks = load_networks(self.protocol, self.device, size=data.image_size)
        self._features: dict[str, dict[str, Tensor]] = {split: {} for split in self._selections}

    def scores(self, generator: Weights, discriminator: Weights, images: int) -> dict[str, float]:
        """`eval/SPLIT/SCORE` -> value, for weights in fp32 with the names that checkpoints use. Also writes a file."""
        given: dict[str, Any] = {"networks": self._networks, "selections": self._selections, "cache": self._features}
        measured: dict[str, Measured] = {}
        with torch.random.fork_rng(devices=[]):
            model = TextToImage(self._model_files(generator, discriminator, images), self.device)
            scores = evaluate(model, self.data, self.protocol, say=lambda line: None, measured=measured, **given)
            copies = self._near_copies(model, measured)
        folder = self.folder / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            scores.save(folder / f"{folder_name(images)}.json")
        except OSError as error:  # a full disk
            self.warn(f"{folder}: {error.strerror}; the scores are only in metrics.jsonl")
        parts = scores.splits.items()
        return {f"eval/{split}/{score.key}": score.value for split, part in parts for score in part.scores} | copies

    def _near_copies(self, model: TextToImage, measured: Mapping[str, Measured]) -> dict[str, float]:
        """`eval/SPLIT/near_copies` -> share of the generated pictures that are near-copies of training pictures; {} for
        a large training set. Without EfficientNet-Lite0, the protocol's first network gives the features."""
        shares = {}
        for split, part in measured.items():
            if self._copies is None or not part.features:
                continue
            key = "efficientnet-lite0" if "efficientnet-lite0" in part.features else next(iter(part.features))
            network = self._networks.get(key) or own_network(model)
            shares[f"eval/{split}/near_copies"] = self._copies.share(part.features[key], network)
        if problem := memorizing(max(shares.values(), default=0.0)):
            self.warn(f"at {model.images_seen:,} images {problem}")
        return shares

    def due(self, images: int) -> bool:
        """Whether an evaluation is due at `images` seen. A resumed run does not repeat an evaluation."""
        passed = passes(self.config.every_images, images, self.train.global_batch)
        return (passed or images >= self.train.total_images) and images != self._evaluated_at

    def take(self, images: int, values: Mapping[str, float]) -> bool:
        """Record the scores at `images`; returns whether `eval.metric` on the first split is the best so far."""
        self._evaluated_at, self._previous_best = images, self.best
        metric = self.config.metric
        value = next((value for name, value in values.items() if name.rpartition("/")[2] == metric), math.nan)
        sign = 1 if better_of(metric) == "higher" else -1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best.value):
            return False
        self.best = Best(images, value)
        return True

    def unsaved(self, images: int) -> None:
        """Record that the checkpoint at `images` could not be written and therefore does not count as the best."""
        if self.best is not None and self.best.images == images:
            self.best = self._previous_best

    def state(self) -> dict[str, Any]:
        """The entry `evaluation` of a checkpoint's state.json."""
        best = dataclasses.asdict(self.best) if self.best else None
        return {"at": self._evaluated_at, "best": best, "by": [self.protocol.sha256, self.config.metric]}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore a result of `state`, unless this result belongs to another protocol or metric."""
        self.best, self._previous_best, self._evaluated_at = None, None, 0
        if state and state["by"] == [self.protocol.sha256, self.config.metric]:
            self._evaluated_at = state["at"]
            self.best = Best(**state["best"]) if state["best"] else None
