"""From a configuration to the engines of a run and the moving average beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from dist_t2i.config.fields import flatten
from dist_t2i.config.resume import is_free
from dist_t2i.config.sections import Config
from dist_t2i.config.validation import check_world
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.distributed.engine import EngineSpec, NetworkEngine
from dist_t2i.errors import ConfigError, UserError
from dist_t2i.inference.model_files import ModelFiles, read_model
from dist_t2i.models.networks import Networks, build_networks
from dist_t2i.training.ema import Average
from dist_t2i.training.gan import Gan
from dist_t2i.utils.tensors import fill


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
    networks = build_networks(
        config.model,
        config.text,
        image_size=config.data.image_size,
        max_tokens=config.data.max_tokens,
        vocab_size=vocab_size,
        edit_width=config.edit.width,
        frozen=frozen.to(device) if frozen is not None else None,
    )
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


_SAME = ("model.", "text.mode", "text.encoder", "text.embedding", "text.layers", "text.heads", "data.image_size")


def read_beginning(config: Config, tokenizer: Tokenizer) -> ModelFiles | None:
    """The model that `edit.init` names; None where it names none.

    Raises ConfigError when it cannot be read, when its networks are not those of `config`, or its words not those of the
    set.
    """
    if not config.edit.init:
        return None
    try:
        files = read_model(config.edit.init)
    except UserError as error:
        raise ConfigError(f"edit.init: {error}", [str(error)]) from None
    ours, theirs = flatten(config), flatten(files.config)
    same = [key for key in ours if key.startswith(_SAME) and not is_free(key, config)]
    if files.config.edit.width:
        same.append("edit.width")
    lines = [f"{key}: is {ours[key]!r}, there {theirs[key]!r}" for key in same if ours[key] != theirs[key]]
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(
            f"edit.init: {files.folder} has other networks than this run:{listed}\nMake them agree.", lines
        )
    if files.tokenizer != tokenizer:
        line = f"edit.init: {files.folder} was trained with another tokenizer than that of data.train: use the set that it knows"
        raise ConfigError(line, [line])
    return files


def begin_with(networks: Networks, files: ModelFiles) -> None:
    """Gives fresh networks the weights of a model: the generator's moving average, the discriminator as it was last.

    What the model lacks, the encoder of source pictures, stays fresh. Raises UserError when a file was tampered with.
    """
    g, d, where = networks.generator, networks.discriminator, files.folder
    fill(g.generator, files.generator, "generator.", where)
    fill(d.discriminator, files.discriminator, "discriminator.", where)
    if g.text_g is not None and d.text_d is not None:
        fill(g.text_g, files.generator, "text_g.", where)
        fill(d.text_d, files.discriminator, "text_d.", where)
    if networks.text is not None:
        fill(networks.text.text, files.discriminator, "text.", where)
    if g.source is not None and files.config.edit.width:
        fill(g.source, files.generator, "source.", where)
