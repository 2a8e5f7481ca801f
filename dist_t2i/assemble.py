"""From a configuration to the engines of a run and the moving average beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from dist_t2i.average import Average
from dist_t2i.beginning import begin_with
from dist_t2i.config.sections import Config
from dist_t2i.config.validation import check_world
from dist_t2i.distributed.engine import EngineSpec, NetworkEngine
from dist_t2i.gan import Gan
from dist_t2i.inference.model_files import ModelFiles
from dist_t2i.models.networks import build_networks


def assemble(
    config: Config,
    vocab_size: int,
    device: torch.device,
    frozen: nn.Module | None = None,
    beginning: ModelFiles | None = None,
) -> tuple[Gan, Average]:
    """The networks with fresh weights (a function of `train.seed`) or those of `beginning` under their engines, on every
    rank alike.

    `config.engine.precision` is a concrete one; `frozen` is the given encoder of text.mode=frozen. Raises ConfigError when
    the batch does not divide among the ranks. Collective; the process group must exist.
    """
    micro_batch = check_world(config, dist.get_world_size())
    torch.manual_seed(config.train.seed)
    networks = build_networks(config, vocab_size, frozen.to(device) if frozen is not None else None)
    if beginning is not None:
        begin_with(networks, beginning)
    average = Average(networks, config.ema, device)
    rates, stages, uses = config.optimizer, config.engine, config.engine.accumulation
    scales = dict.fromkeys(("text_g", "text_d", "text"), rates.text_lr_scale)
    common = EngineSpec("", 0, micro_batch, uses, stages.precision, rates.discriminator_lr, scales)
    generator_spec = replace(common, name="generator", stage=stages.generator_stage, learning_rate=rates.generator_lr)
    discriminator_spec = replace(common, name="discriminator", stage=stages.discriminator_stage)
    generator = NetworkEngine(networks.generator, generator_spec, config, device)
    discriminator = NetworkEngine(networks.discriminator, discriminator_spec, config, device)
    text = None
    if networks.text is not None:  # one micro-step for each side's gradient
        spec = replace(discriminator_spec, name="text", accumulation=2 * uses)
        text = NetworkEngine(networks.text, spec, config, device)
    return Gan(config, generator, discriminator, text, frozen), average
