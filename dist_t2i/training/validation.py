"""Scores during training: the moving average judged by a small protocol now and then, and which checkpoint is the best.

The scores at N images are those that `tools/evaluate.py` gives the checkpoint at N images. Nothing of the training is
touched: the weights are copied, the judge draws from no random state that training reads. Rank 0 judges; the others wait.

    RUN/evaluations/images-000123456.json    scores with their manifest
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_t2i.checkpoint.store import folder_name
from dist_t2i.config.sections import Config
from dist_t2i.data.open_data import open_entry, storage_options
from dist_t2i.errors import UserError
from dist_t2i.eval.evaluate import evaluate, load_networks, select_all
from dist_t2i.eval.protocol import load_protocol
from dist_t2i.eval.scoring import better_of, keys_of
from dist_t2i.inference.model_files import ModelFiles, read_frozen
from dist_t2i.inference.pipeline import TextToImage
from dist_t2i.training.schedule import passes

if TYPE_CHECKING:
    from torch import Tensor

    from dist_t2i.data.shard_set import ShardSet

FOLDER = "evaluations"


@dataclass(frozen=True)
class Best:
    """The best scores so far."""

    images: int
    value: float


class Periodic:
    """Every rank has one; `prepare` and `scores` are rank 0's, the rest is the same everywhere.

    Raises UserError for a protocol or a metric that there is not.
    """

    def __init__(
        self, folder: Path, config: Config, data: ShardSet, device: torch.device, warn: Callable[[str], None]
    ) -> None:
        self._folder, self._config, self._device, self._warn = folder, config, device, warn
        self._protocol = load_protocol(config.eval.protocol)
        if config.eval.metric not in keys_of(self._protocol):
            raise UserError(
                f"eval.metric: protocol {self._protocol.name} has no score {config.eval.metric!r}; it has "
                f"{', '.join(keys_of(self._protocol))}"
            )
        if not self._protocol.ema:
            raise UserError(
                f"eval.protocol: {self._protocol.name} says `ema: false`, but training scores the moving average"
            )
        self._data, self._words = data, data.tokenizer
        self.best: Best | None = None
        self._before: Best | None = None
        self._at = 0

    # ---- rank 0 ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Reads the held-out pictures and loads the judges, before training begins. Raises UserError."""
        if self._config.eval.data:
            self._data = open_entry(self._config.eval.data, storage_options(self._config.data))
        size = self._config.data.image_size
        self._selections = {split: rows.loaded(size) for split, rows in select_all(self._data, self._protocol).items()}
        self._networks = load_networks(self._protocol, self._device)
        self._features: dict[str, dict[str, Tensor]] = {split: {} for split in self._selections}
        text, limit = self._config.text, self._config.data.max_tokens
        self._frozen = read_frozen(text, self._words, limit) if text.mode == "frozen" else None

    def scores(self, generator: Mapping, discriminator: Mapping, images: int) -> dict[str, float]:
        """`eval/SPLIT/SCORE` -> value of these weights (fp32, as checkpoints name them); the scores are kept in the run."""
        folder = self._folder
        files = ModelFiles(folder, self._config, self._words, generator, discriminator, images, self._frozen)
        with torch.random.fork_rng(devices=[]):
            found = evaluate(
                TextToImage(files, self._device),
                self._data,
                self._protocol,
                say=lambda line: None,
                networks=self._networks,
                selections=self._selections,
                cache=self._features,
            )
        try:
            (folder / FOLDER).mkdir(exist_ok=True)
            found.save(folder / FOLDER / f"{folder_name(images)}.json")
        except OSError as error:  # a full disk
            self._warn(f"{folder / FOLDER}: {error.strerror}; the scores are in metrics.jsonl alone")
        return {
            f"eval/{split}/{score.key}": score.value for split, part in found.splits.items() for score in part.scores
        }

    # ---- every rank --------------------------------------------------------------------------------------------------

    def due(self, images: int) -> bool:
        """Whether to evaluate at `images` seen; not again in a run that is resumed right after its evaluation."""
        train = self._config.train
        due = passes(self._config.eval.every_images, images, train.global_batch) or images >= train.total_images
        return due and images != self._at

    def take(self, images: int, values: Mapping[str, float]) -> bool:
        """The scores at `images`: whether they are the best so far, by `eval.metric` on the protocol's first split."""
        self._at, self._before = images, self.best
        metric = self._config.eval.metric
        value = next((value for name, value in values.items() if name.rpartition("/")[2] == metric), math.nan)
        sign = 1 if better_of(metric) == "higher" else -1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best.value):
            return False
        self.best = Best(images, value)
        return True

    def unsaved(self, images: int) -> None:
        """The checkpoint at `images` could not be written: what it would have kept is not the best that there is."""
        if self.best is not None and self.best.images == images:
            self.best = self._before

    def state(self) -> dict[str, Any]:
        """For state.json."""
        best = dataclasses.asdict(self.best) if self.best else None
        return {"at": self._at, "best": best, "by": self._by()}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """What `state` gave; what another protocol or metric found is no measure for this one."""
        if state and state["by"] == self._by():
            self._at = state["at"]
            self.best = Best(**state["best"]) if state["best"] else None

    def _by(self) -> list[str]:
        return [self._protocol.sha256, self._config.eval.metric]
