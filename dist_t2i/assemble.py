"""From a configuration to the engines of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dist_t2i.config import Config
from dist_t2i.configrules import check_world
from dist_t2i.engine import EngineSpec, NetworkEngine, resolve_precision
from dist_t2i.gan import Gan
from dist_t2i.networks import build_networks


def assemble(config: Config, vocab_size: int, device: torch.device, frozen: nn.Module | None = None) -> Gan:
    """The networks with fresh weights (a function of `train.seed`) under their engines, on every rank alike.

    `frozen` is the given encoder of text.mode=frozen. Raises ConfigError when the batch does not divide among the ranks
    or the device lacks the precision asked for. Collective; the process group must exist.
    """
    micro_batch = check_world(config, dist.get_world_size())
    precision = resolve_precision(config.engine.precision, device)
    torch.manual_seed(config.train.seed)
    networks = build_networks(config, vocab_size, frozen.to(device) if frozen is not None else None)
    rates, scale, uses = config.optimizer, config.optimizer.text_lr_scale, config.engine.accumulation

    def engine(name: str, module: nn.Module, stage: int, rate: float, accumulation: int) -> NetworkEngine:
        scales = {"text_g": scale, "text_d": scale, "text": scale}
        return NetworkEngine(
            module, EngineSpec(name, stage, micro_batch, accumulation, precision, rate, scales), config, device
        )

    generator = engine("generator", networks.generator, config.engine.generator_stage, rates.generator_lr, uses)
    discriminator = engine(
        "discriminator", networks.discriminator, config.engine.discriminator_stage, rates.discriminator_lr, uses
    )
    text = None
    if networks.text is not None:  # one micro-step for each side's gradient
        text = engine("text", networks.text, config.engine.discriminator_stage, rates.discriminator_lr, 2 * uses)
    return Gan(config, generator, discriminator, text, frozen)
