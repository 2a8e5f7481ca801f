"""The generators by the names that `model.generator.kind` may have.

Every kind is a module built from (GeneratorConfig, image size in pixels, text width), with `noise_width` and
`condition_width` (numbers a picture takes of each noise) and

    forward(noise [B, Z], sentence [B, E], words [B, T, E], mask bool [B, T], condition_noise [B, C]) -> Generated

in which row i of the pictures depends on row i of the inputs alone, and on no other randomness.
"""

from __future__ import annotations

from dist_t2i.models.attn import AttnGenerator
from dist_t2i.models.generator import Generator
from dist_t2i.models.options import GeneratorConfig

GENERATORS: dict[str, type[Generator]] = {"plain": Generator, "attn": AttnGenerator}


def build_generator(config: GeneratorConfig, image_size: int, text_width: int) -> Generator:
    """The generator that the configuration names, with fresh weights. Raises ValueError for sizes that do not fit."""
    return GENERATORS[config.kind](config, image_size, text_width)
