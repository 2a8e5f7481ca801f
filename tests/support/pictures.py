"""Small captioned pictures, and sets of them, for tests of everything that reads data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image

from dist_t2i.config.sections import Config, DataConfig, EngineConfig, TrainConfig
from dist_t2i.data.shard_set import ShardSet, open_set
from dist_t2i.data.stream.stream import Stream, open_stream
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.sharding.sources.folder import find_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options


def color(number: int) -> tuple[int, int, int]:
    """A color that tells pictures apart."""
    return (number * 37 % 256, number * 101 % 256, number * 197 % 256)


def picture(number: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """One color, with a black left edge so that mirroring shows."""
    image = Image.new("RGB", size, color(number))
    image.paste((0, 0, 0), (0, 0, size[0] // 4, size[1]))
    return image


def shapes(n: int = 12, side: int = 32) -> torch.Tensor:
    """Colored rectangles, different ones on every picture: uint8 [n, 3, side, side]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((n, 3, side, side), 255, dtype=torch.uint8)
    for image in images:
        for _ in range(3):
            top, left = torch.randint(side - 8, (2,), generator=generator).tolist()
            color = torch.randint(256, (3, 1, 1), generator=generator)
            image[:, top : top + 8, left : left + 8] = color.to(torch.uint8)
    return images


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def make_folder(folder: Path, count: int, *, captions: int = 2, kind: str = "png") -> Path:
    """`count` pictures and captions.jsonl; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = f"p{number:04d}.{kind}"
        (folder / name).write_bytes(encoded(picture(number), {"jpg": "JPEG"}.get(kind, kind.upper())))
        texts = [f"picture number {number} said in way {way}" for way in range(captions)]
        lines.append(json.dumps({"image": name, "captions": texts}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_set(folder: Path, count: int, *, shard_samples: int = 10, holdout: float = 0.0, **options) -> ShardSet:
    """A set of `count` pictures in FOLDER/set, its pictures in FOLDER/pictures."""
    captions = make_folder(folder / "pictures", count, **options)
    items, problems = find_items(folder / "pictures", captions, holdout)
    write_set(folder / "set", items, problems, Options(shard_samples=shard_samples))
    return open_set(folder / "set")


def config_for(
    data_set: ShardSet, *, batch: int = 8, accumulation: int = 1, seed: int = 3, size: int = 32, **data
) -> Config:
    """A configuration that reads a set."""
    data = {"workers": 0, "shuffle_window": 16} | data
    return Config(
        data=DataConfig(train=str(data_set.folder), image_size=size, **data),
        train=TrainConfig(global_batch=batch, seed=seed),
        engine=EngineConfig(accumulation=accumulation),
    )


def stream_of(config: Config, tokenizer: Tokenizer, **options) -> Stream:
    """The stream that a configuration asks for."""
    return open_stream(
        config.data,
        tokenizer,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        accumulation=config.engine.accumulation,
        edit=config.edit,
        **options,
    )
