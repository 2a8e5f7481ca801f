"""Tiny models in the layout of runs and exports, for tests of code that reads these. Real files, untrained weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import acquire
from dist_t2i.config import files as config_files
from dist_t2i.config.sections import Config
from dist_t2i.data.tokenizer import Tokenizer, train_tokenizer
from dist_t2i.models.networks import build_networks

CAPTIONS = (
    "woman pilot light skin tone",
    "woman pilot dark skin tone",
    "man cook light skin tone",
    "man cook dark skin tone",
    "red apple",
    "root vegetable",
    "snowboarder",
    "flag Germany",
)

SMALL = (
    "data.image_size=32",
    "data.max_tokens=12",
    "text.embedding=16",
    "model.generator.noise=8",
    "model.generator.condition=8",
    "model.generator.channels=[16, 8]",
    "model.discriminator.channels=[8, 16]",
    "model.discriminator.embedding=16",
)


def tokenizer() -> Tokenizer:
    return train_tokenizer(Counter(CAPTIONS), vocabulary=200)


def config(*overrides: str) -> Config:
    return config_files.loads("", [*SMALL, *overrides])


def write_run(
    run: Path, *overrides: str, images: int = 64, seed: int = 0, words: Tokenizer | None = None, stir: str = ""
) -> Path:
    """A run folder with one committed checkpoint, as the trainer leaves it. With `stir`, parameters that start at zero
    and whose names begin with `stir` get random values."""
    from dist_t2i.inference.model_files import read_frozen

    cfg, words = config(*overrides), words or tokenizer()
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config_files.dump(cfg))
    words.save(run / "tokenizer.json")
    torch.manual_seed(seed)
    frozen = read_frozen(cfg.text, words, cfg.data.max_tokens).build() if cfg.text.mode == "frozen" else None
    networks = networks_of(cfg, words.vocab_size, frozen)
    ema = dict(networks.generator.state_dict())
    for name, value in ema.items():
        if stir and name.startswith(stir) and not value.any():
            value.normal_(std=0.1)
    files = {"generator": ema, "discriminator": networks.discriminator.state_dict()}
    if networks.text is not None:
        files["text"] = networks.text.state_dict()
        ema = ema | {name: value * 0.9 for name, value in files["text"].items()}
    mine = acquire(run / "checkpoints")
    store.save(mine, images, {**files, "ema": ema}, {"step": 2}, keep=store.Retention())
    mine.release()
    return run


def write_tone_set(folder: Path, roles: int = 24) -> Path:
    """A set of random squares in light and dark, captioned like OpenMoji, half of it held out as split `test`."""
    import numpy as np
    from PIL import Image

    from dist_t2i.sharding.sources.folder import find_items
    from dist_t2i.sharding.write_set import write_set
    from dist_t2i.sharding.writing.prepare import Options

    pictures = folder.with_name(f"{folder.name}-pictures")
    pictures.mkdir(parents=True)
    random = np.random.default_rng(0)
    for role in range(roles):
        squares = random.integers(0, 200, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for tone, lift in (("light", 50), ("dark", 0)):
            Image.fromarray(squares + np.uint8(lift)).save(pictures / f"{role:02d}-{tone}.png")
            (pictures / f"{role:02d}-{tone}.txt").write_text(f"role number {role} {tone} skin tone\n")
    items, problems = find_items(pictures, None, 0.5)
    write_set(folder, items, problems, Options())
    return folder


def networks_of(config, vocab_size, frozen=None):
    """Fresh networks of a whole configuration."""
    return build_networks(
        config.model,
        config.text,
        image_size=config.data.image_size,
        max_tokens=config.data.max_tokens,
        vocab_size=vocab_size,
        edit_width=config.edit.width,
        frozen=frozen,
    )
