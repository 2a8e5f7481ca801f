"""Trains DF-GAN (dfgan.py) on a set for a given time, and scores it as tools/evaluate.py scores a run.

    python tools/bench/dfgan_train.py --data data/scenes32 --seconds 1200 [--rates 0.5 1 2] [--out runs/dfgan]

One network pair is trained per rate, which multiplies the learning rates of the paper. Each training gets `--seconds`,
without the time for the sentence vectors and the scores. As in the ablation's arm `frozen`, the sentences are vectors
of all-MiniLM-L6-v2 (dist_t2i/ablation/sentence_encoder.py). The scored generator is a moving average. OUT/RATE has
scores.json, the weights and a grid of samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from torch import Tensor

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage
    from tools.bench.dfgan import PeerGenerator

HALF_LIFE, RAMP = 10_000, 0.05
"""The moving average: its half-life in images, and the largest half-life as a share of the images seen."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="set with a held-out split")
    parser.add_argument("--seconds", type=float, default=1200.0, help="training time of each rate (default: 1200)")
    parser.add_argument("--images", type=int, default=10**9, help="stop a training after this number of images")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="(default: 0.5 1 2)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels (default: 32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--protocol", default="", help="(default: that of tools/evaluate.py for the set)")
    parser.add_argument("--without", action="append", default=[], help="leave out the metrics of this network")
    parser.add_argument("--out", type=Path, default=Path("runs/dfgan"))
    options = parser.parse_args()
    import torch

    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.open_data import open_data
    from dist_t2i.eval.evaluate import evaluate, load_networks, protocol_for
    from dist_t2i.eval.protocol import load_protocol
    from dist_t2i.eval.scores import table

    torch.set_num_threads(options.threads)
    data = open_data(DataConfig(train=options.data))
    protocol = load_protocol(options.protocol) if options.protocol else protocol_for(data)
    sentences = Sentences(data, options.out / "sentences.safetensors")
    networks = load_networks(protocol, "cpu", without=options.without, size=options.size)
    for rate in options.rates:
        folder = options.out / f"rate-{rate:g}"
        model = train(options, data, sentences, rate)
        print(f"rate {rate:g}: {model.images_seen:,} images, {model.rate:.1f} images/s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.generator.state_dict(), folder / "generator.pt")
        scores = evaluate(cast("TextToImage", model), data, protocol, say=print, networks=networks)
        scores.save(folder / "scores.json")
        save_grid(model, data, folder / "samples.png")
        print(table(scores.as_json()), flush=True)
    return 0


class Sentences:
    """The sentence vectors of all captions of a set, computed once and kept in a file."""

    def __init__(self, data: ShardSet, path: Path) -> None:
        from dist_t2i.ablation.runs import all_captions
        from dist_t2i.ablation.sentence_encoder import write_table
        from dist_t2i.utils.tensors import read_tensors

        stamp = path.with_suffix(".set")
        if not (stamp.is_file() and stamp.read_text() == data.fingerprint):
            print(f"writing the sentence vectors to {path}", flush=True)
            write_table(path, all_captions(data))
            stamp.write_text(data.fingerprint)
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            captions = json.loads(file.metadata()["captions"])
        self._row = {caption: row for row, caption in enumerate(captions)}
        self._vectors = read_tensors(path)["vectors"]

    @property
    def width(self) -> int:
        return self._vectors.shape[1]

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """float32 [N, width]"""
        return self._vectors[[self._row[caption] for caption in captions]]


class PeerModel:
    """What `evaluate` uses of a model: a generator that draws pictures of captions."""

    def __init__(self, generator: PeerGenerator, sentences: Sentences, size: int, images: int, rate: float) -> None:
        import torch

        self.generator, self.sentences = generator.eval(), sentences
        self.image_size, self.images_seen, self.rate = size, images, rate
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(
            model=SimpleNamespace(generator=SimpleNamespace(truncation=1.0, color_sharpness=1.0))
        )
        self.files = self

    def sha256(self) -> str:
        """The hash of the weights."""
        from dist_t2i.utils.files import sha256_of

        return sha256_of(weight.numpy().tobytes() for weight in self.generator.state_dict().values())

    def sample(self, captions: Sequence[str], seeds: Sequence[int], truncation: float | None = None) -> Tensor:
        """uint8 [N, 3, H, W], one picture for each caption and seed."""
        import torch

        from dist_t2i.data.images import to_uint8
        from tools.bench.dfgan import NOISE

        noise = torch.stack([torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        scale = 1.0 if truncation is None else truncation
        with torch.no_grad():
            return to_uint8(self.generator(noise * scale, self.sentences(captions)))


def train(options: argparse.Namespace, data: ShardSet, sentences: Sentences, rate: float) -> PeerModel:
    """Trains for `options.seconds`; returns the moving average of the generator."""
    import torch

    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.images import to_unit
    from dist_t2i.data.stream.stream import open_stream
    from tools.bench.dfgan import NOISE, Peer

    torch.manual_seed(options.seed)
    peer = Peer(options.size, torch.device("cpu"), sentences.width, rate)
    average = copy.deepcopy(peer.generator).requires_grad_(False)
    config = DataConfig(train=options.data, image_size=options.size, workers=0, flip=False)
    stream = open_stream(config, data.tokenizer, seed=options.seed, global_batch=options.batch, data_set=data)
    images, begin, last = 0, time.monotonic(), time.monotonic()
    for batch in stream:
        real = to_unit(batch.images)
        peer.step(real, sentences(batch.captions), torch.randn(len(real), NOISE))
        images += len(real)
        keep = 0.5 ** (len(real) / max(1.0, min(HALF_LIFE, RAMP * images)))
        for mean, weight in zip(average.parameters(), peer.generator.parameters(), strict=True):
            mean.lerp_(weight.detach(), 1 - keep)
        now = time.monotonic()
        if now - last > 30:
            last = now
            print(f"rate {rate:g}: {images:,} images after {now - begin:.0f} s", flush=True)
        if now - begin > options.seconds or images >= options.images:
            break
    return PeerModel(average, sentences, options.size, images, images / (time.monotonic() - begin))


def save_grid(model: PeerModel, data: ShardSet, path: Path, captions: int = 8, samples: int = 8) -> None:
    """Writes a picture with `samples` samples of each of some held-out captions."""
    from PIL import Image

    split = next(name for name in data.splits if name != "train")
    rows: Any = data.samples(split)
    captions = min(captions, len(rows))
    texts = [rows[i].captions[0] for i in range(captions)]
    images = model.sample([text for text in texts for _ in range(samples)], list(range(samples)) * captions)
    size = model.image_size
    grid = images.view(captions, samples, 3, size, size).permute(0, 3, 1, 4, 2).reshape(captions * size, -1, 3)
    Image.fromarray(grid.contiguous().numpy()).save(path)
    print("\n".join(texts))


if __name__ == "__main__":
    sys.exit(main())
