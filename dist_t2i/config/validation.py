"""Checks of a configuration: ranges, combinations of keys, and the global batch against the number of ranks."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from dist_t2i.config.fields import build, flatten, keys, value_of
from dist_t2i.config.sections import Config
from dist_t2i.errors import ConfigError, DataError
from dist_t2i.models.config import Problem
from dist_t2i.storage.clients import OBJECT_STORES
from dist_t2i.storage.urls import scheme_of, unchained


def problems_of(config: Config) -> list[Problem]:
    """The problems in the values of `config`; an empty list if the configuration is valid."""
    problems = list(_ranges(config))
    bad = {key for involved, _ in problems for key in involved}
    usable = build({key: value for key, value in flatten(config).items() if key not in bad})
    return problems + [problem for problem in _combinations(usable) if bad.isdisjoint(problem[0])]


def _ranges(config: Config) -> Iterator[Problem]:
    for key in keys().values():
        value = value_of(config, key.name)
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if is_number and typing.get_origin(key.type) is not typing.Literal and number not in key.bounds:
                yield (key.name,), f"must be {key.bounds}, is {number:g}"
                break


def _combinations(config: Config) -> Iterator[Problem]:
    for rules in (_text, _sizes, _declared, _engines, _mirror):
        yield from rules(config)
    edit, data, batch = config.edit, config.data, config.train.global_batch
    if edit.init and not edit.width:
        yield ("edit.init", "edit.width"), "is only read if edit.width is not 0: set edit.width, for example to 48"
    if edit.init and config.train.init:
        yield ("train.init", "edit.init"), "a run starts from one model: set train.init or edit.init, not both"
    if edit.own + edit.none > 1:
        yield ("edit.own", "edit.none"), f"is {edit.own:g}, but its sum with edit.none={edit.none:g} must not exceed 1"
    if batch % 2:
        why = "each row takes its wrong caption from its neighbor, so rows form pairs"
        yield ("train.global_batch",), f"must be even ({why}), is {batch}"
    entries = [data.train] if isinstance(data.train, str) else data.train
    if data.weights and len(data.weights) != len(entries):
        counts = f"{len(data.weights)} numbers for {len(entries)} entries"
        yield ("data.weights", "data.train"), f"has {counts} of data.train: give one per entry, or no weights"


def _text(config: Config) -> Iterator[Problem]:
    text = config.text
    if text.mode == "frozen" and not text.frozen:
        needed = "frozen needs text.frozen: the path of an exported folder or .safetensors table of caption vectors"
        yield ("text.mode", "text.frozen"), needed
    if text.frozen and text.mode != "frozen":
        remedy = "set the mode, or leave text.frozen empty"
        yield ("text.frozen", "text.mode"), f"is only read with text.mode=frozen, but the mode is {text.mode}: {remedy}"
    if text.encoder == "lstm" and text.embedding % 2:
        why = "each direction of the LSTM computes one half of the embedding"
        yield ("text.embedding", "text.encoder"), f"must be even ({why}), is {text.embedding}"
    if text.encoder == "transformer" and text.embedding % text.heads:
        yield ("text.embedding", "text.heads"), f"must be a multiple of text.heads={text.heads}, is {text.embedding}"


def _sizes(config: Config) -> Iterator[Problem]:
    size = config.data.image_size
    if size & (size - 1):
        yield ("data.image_size",), f"must be a power of two, is {size}; the nearest is {2 ** round(math.log2(size))}"
        return
    scales = int(math.log2(size)) - 1  # 4, 8, ..., size
    for network in ("generator", "discriminator"):
        key = f"model.{network}.channels"
        channels = value_of(config, key)
        if not channels:
            yield (key,), "needs at least one number, which is the number of channels at 4 pixels"
        elif (count := len(channels)) > scales:
            reach = f"{count} scales reach {4 * 2 ** (count - 1)} pixels, beyond data.image_size={size}"
            yield (key, "data.image_size"), f"{reach}: give at most {scales} numbers"


def _declared(section: Any, prefix: str = "") -> Iterator[Problem]:
    """The problems that the method `problems` of a section and of each nested section yields."""
    for names, text in section.problems() if hasattr(section, "problems") else ():
        yield tuple(prefix + name for name in names), text
    for name, value in vars(section).items():
        if dataclasses.is_dataclass(value):
            yield from _declared(value, f"{prefix}{name}.")


def _engines(config: Config) -> Iterator[Problem]:
    engine, loss = config.engine, config.loss
    if engine.discriminator_stage == 3 and loss.penalty in ("r1", "ma_gp"):
        reason = f"is 3, but stage 3 cannot compute {loss.penalty}, whose gradient passes through another gradient"
        remedy = "use loss.penalty=fd_r1, loss.penalty=none, or a stage of at most 2"
        yield ("engine.discriminator_stage", "loss.penalty"), f"{reason}: {remedy}"
    for network in ("generator", "discriminator"):
        stage = f"engine.{network}_stage"
        if engine.offload != "none" and value_of(config, stage) == 0:
            remedy = f"set {stage} to 1, 2 or 3, or set engine.offload to none"
            yield ("engine.offload", stage), f"{engine.offload} needs ZeRO: {remedy}"


def _mirror(config: Config) -> Iterator[Problem]:
    url, key = config.checkpoint.mirror, ("checkpoint.mirror",)
    if not url:
        return
    try:
        scheme, parts = scheme_of(unchained(url)), urlsplit(url)
        password = parts.password
    except (DataError, ValueError) as error:
        yield key, str(error)
        return
    if password:
        yield key, "must not hold a password, because the run folder keeps the configuration: use the environment"
    elif scheme in ("http", "https"):
        yield key, f"is {url}, but a web server can only be read: use object storage or a folder"
    elif scheme and scheme not in (*OBJECT_STORES, "file") and scheme not in _file_systems():
        yield key, f"no library knows {scheme}://: use a folder, s3://, gs://, az://, or a scheme that fsspec knows"
    elif scheme in OBJECT_STORES and not parts.netloc:
        yield key, f"names no bucket ({url}): expected {scheme}://bucket/folder"


def _file_systems() -> set[str]:
    from fsspec.registry import known_implementations, registry

    return {*known_implementations, *registry}


def check_world(config: Config, world_size: int) -> int:
    """Rows of one micro-batch on one rank. Raises `ConfigError` unless the global batch divides into `world_size *
    engine.accumulation` micro-batches of equal size, each of whole groups of loss.mismatched_group rows. The size must
    also be even, because rows form pairs."""
    batch, accumulation = config.train.global_batch, config.engine.accumulation
    group = math.lcm(2, config.loss.mismatched_group)
    parts = world_size * accumulation
    if batch % (group * parts) == 0:
        return batch // parts
    below, above = batch // (group * parts) * group * parts, -(-batch // (group * parts)) * group * parts
    choices = " or ".join(str(size) for size in (below, above) if size > 0)
    given = f"{batch} images over {world_size} rank{'s' * (world_size > 1)} x engine.accumulation={accumulation}"
    wanted = (
        "whole and even"
        if group == 2
        else f"a multiple of {group}, because loss.mismatched_group is {config.loss.mismatched_group}"
    )
    problem = f"{given} give {batch / parts:g} images per micro-batch, but this number must be {wanted}"
    line = f"train.global_batch: {problem}: use {choices}, another accumulation, or another number of ranks"
    raise ConfigError(line, [line])
