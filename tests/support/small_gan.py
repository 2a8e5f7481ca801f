"""A small GAN under its engines, and rows of a synthetic stream for it."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

VOCABULARY, TOKENS, BATCH = 40, 8, 8


@contextlib.contextmanager
def smooth_activations():
    """Replaces the leaky ReLU in this process by a function without a kink.

    If round-off moves an activation across the kink, a gradient jumps beyond any bound on round-off. Which activations
    lie near the kink depends on the processor.
    """

    def smooth(x, slope, inplace=False):
        return slope * x + (1 - slope) * torch.nn.functional.softplus(x)

    with mock.patch.object(torch.nn.functional, "leaky_relu", smooth):
        yield


def tiny_config(**overrides):
    """A run of 32 px with region maps; `a__b=c` overrides `a.b`."""
    from dist_t2i.config.fields import build

    values = {
        "data.image_size": 32,
        "data.max_tokens": TOKENS,
        "text.embedding": 16,
        "model.generator.noise": 8,
        "model.generator.condition": 8,
        "model.generator.channels": (16, 12, 8),
        "model.discriminator.channels": (8, 12, 16),
        "model.discriminator.embedding": 16,
        "model.discriminator.regions": (8,),
        "model.discriminator.region_embedding": 8,
        "model.discriminator.words": 0,
        "model.generator.layout": 2048,
        "loss.g_alignment_text": 1.0,
        "loss.g_alignment_words": 1.0,
        "loss.g_alignment_image": 1.0,
        "loss.g_alignment_regions": 1.0,
        "loss.g_mode_seeking": 0.0,
        "loss.kl": 0.02,
        "optimizer.gradient_clipping": 0.0,
        "optimizer.generator_lr": 8e-4,
        "optimizer.discriminator_lr": 8e-4,
        "loss.penalty_every": 2,
        "train.global_batch": BATCH,
        "train.total_images": 1000,
        "engine.precision": "fp32",
        # AdamW divides by the gradient's size: with a tiny epsilon, round-off in a gradient that should be zero becomes
        # a whole step. These tests compare gradients, so epsilon is large.
        "optimizer.epsilon": 1e-3,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return build(values)


def synthetic_rows(first: int, count: int):
    """Rows [first, first + count) of an endless synthetic stream; a batch contains some pictures and captions twice."""
    from dist_t2i.data.stream.batch import Batch

    rows = []
    for position in range(first, first + count):
        picture = position % 11 if position % 8 else (position + 1) % 11  # neighbours 0, 1 of a batch are the same
        generator = torch.Generator().manual_seed(picture)
        length = int(torch.randint(1, TOKENS + 1, (), generator=generator))
        tokens = torch.randint(2, VOCABULARY, (TOKENS,), generator=generator)
        tokens[length:] = 0
        pixels = torch.randint(0, 256, (3, 4, 4), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
        rows.append((pixels.to(torch.uint8), tokens, length, picture))
    images, tokens, lengths, ids = zip(*rows, strict=True)
    ids = torch.tensor(ids)
    return Batch(
        images=torch.stack(images),
        tokens=torch.stack(tokens),
        lengths=torch.tensor(lengths),
        image_ids=ids,
        caption_ids=ids + 1000,
        positions=torch.arange(first, first + count),
        captions=[str(int(i)) for i in ids],
        keys=[str(int(i)) for i in ids],
        **synthetic_sources(torch.stack(images), ids, first),
    )


def synthetic_sources(images, ids, first: int) -> dict:
    """Source by position: the picture itself, none, or a darker copy in place of another picture."""
    kind = (first + torch.arange(len(ids))) % 3
    shown = torch.stack([image * (k != 1) // (1 + (k == 2)) for image, k in zip(images, kind, strict=True)])
    return {"sources": shown.to(torch.uint8), "source_ids": torch.where(kind == 1, -1, ids + 100 * (kind == 2))}


def micro_batches(images: int, accumulation: int, rank: int, world_size: int):
    """This rank's rows of the step at `images`, in the layout that the stream has."""
    m = BATCH // (world_size * accumulation)
    return [synthetic_rows(images + (a * world_size + rank) * m, m) for a in range(accumulation)]


def build_gan(config, frozen=None):
    """Both engines (and the shared encoder's) over the process group that the environment describes."""
    from dist_t2i.distributed.engine import init_distributed
    from dist_t2i.training.setup import assemble

    device = torch.device("cpu")
    init_distributed(device)
    return assemble(config, VOCABULARY, device, frozen)[0]


def frozen_encoder():
    """A given encoder with weights of its own (text.mode=frozen)."""
    from dist_t2i.models.config import TextConfig
    from dist_t2i.models.frozen_text import PretrainedEncoder
    from dist_t2i.models.text_encoder import build_text_encoder

    torch.manual_seed(99)
    return PretrainedEncoder(build_text_encoder(TextConfig(embedding=12), VOCABULARY, TOKENS))
