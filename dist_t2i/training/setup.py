"""Builds the parts of a run. This module takes the full configuration; other modules in training/ take sections."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_t2i.checkpoint import divergence, run_folder, store
from dist_t2i.checkpoint.lease import Lease
from dist_t2i.checkpoint.mirror import Mirror
from dist_t2i.checkpoint.store import Checkpoint
from dist_t2i.config import files as config_files
from dist_t2i.config.fields import flatten
from dist_t2i.config.resume import differences, with_earlier_defaults
from dist_t2i.config.sections import Config
from dist_t2i.config.validation import check_world
from dist_t2i.data.open_data import open_data
from dist_t2i.data.shard_set import ShardSet
from dist_t2i.data.stream.stream import Stream, open_stream
from dist_t2i.data.tokenizer import Tokenizer, grown
from dist_t2i.distributed.collectives import on_main
from dist_t2i.distributed.engine import EngineSpec, NetworkEngine, init_distributed, resolve_precision
from dist_t2i.distributed.launch import Rank, has_gpu
from dist_t2i.distributed.preemption import StopFlag
from dist_t2i.distributed.watchdog import Watchdog
from dist_t2i.errors import ConfigError, ExitStatus, UserError
from dist_t2i.inference.model_files import TOKENIZER, ModelFiles, read_frozen, read_model
from dist_t2i.inference.warm_start import about, started_from, with_tokens
from dist_t2i.models.networks import Networks, build_networks
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.training.checkpointing import Checkpointer
from dist_t2i.training.ema import Average
from dist_t2i.training.gan import Gan
from dist_t2i.training.health import Health
from dist_t2i.training.sample_grid import SampleGrid
from dist_t2i.training.trainer import Trainer
from dist_t2i.training.validation import Validation, read_protocol
from dist_t2i.utils.tensors import fill


def train(config: Config, rank: Rank, *, allow_changes: bool = False, stop: StopFlag | None = None) -> ExitStatus:
    """Train as one rank of a run until `train.total_images` are seen or a signal asks to stop; returns the exit status.

    Continues from the newest checkpoint in the run folder. A caller may install the `stop` flag before it imports this
    package, so that no signal is lost during the import. Raises UserError.
    """
    device = torch.device("cuda", rank.local_rank) if has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The flag stays installed until the process ends: a late signal must not change the exit status.
    stop = stop or StopFlag(announce=rank.rank == 0).install()
    watchdog = Watchdog(Path(config.run.folder), rank.rank, rank.world_size, config.train.hang_seconds).start()
    init_distributed(device)
    try:
        trainer = build_trainer(config, device, watchdog, allow_changes=allow_changes)
        status = trainer.run(stop)
    finally:
        watchdog.stop()
        with contextlib.suppress(Exception):  # if other ranks have ended, this call fails and must not hide their error
            dist.destroy_process_group()
    # The mirror finishes its upload after the end of the process group, so that the other ranks do not wait.
    trainer.mirror.finish(finished=status == ExitStatus.FINISHED, stopping=lambda: stop.requested)
    return status


def build_trainer(config: Config, device: torch.device, watchdog: Watchdog, *, allow_changes: bool) -> Trainer:
    """The trainer of the run in `config.run.folder`, restored from the newest intact checkpoint if there is one.

    Collective; the process group must exist. Raises UserError.
    """
    precision = resolve_precision(config.engine.precision, device)
    config = replace(config, engine=replace(config.engine, precision=precision))
    folder, main = Path(config.run.folder), dist.get_rank() == 0
    if (recorded := folder / "config.yaml").is_file():
        config = with_earlier_defaults(config_files.load(recorded), config)
    text, train = config_files.dump(config), config.train

    # Open the data. Check the run folder and take its lease. If the newest checkpoint is missing, restore it from the
    # mirror.
    title, total = config.run.name or folder.name, train.total_images
    reporter = Reporter(folder, config.report, total_images=total, title=title, wandb_config=flatten(config), main=main)
    data, retry = open_data(config.data), config.data.retry_seconds
    flags = {"main": main, "allow_changes": allow_changes}
    mirror = Mirror(config.checkpoint, folder, text, reporter, retry_seconds=retry, **flags)
    on_main(lambda: mirror.look(data.fingerprint), slow=True)
    # A run that diverged before its first healthy checkpoint starts anew: those in its mirror are sick.
    new = on_main(lambda: not (store.committed(folder) or (mirror.has_checkpoints and not divergence.stopped(folder))))
    initial = read_initial(config, data.tokenizer) if new else None  # before the folder is prepared: it may not fit
    leases: list[Lease] = []
    warn = partial(print, "warning:", flush=True)  # a process that does not hold the lease must not write into the log
    contents = text, {"path": str(data.folder), "fingerprint": data.fingerprint}
    on_main(lambda: leases.append(run_folder.prepare(folder, *contents, allow_changes=allow_changes, warn=warn)))
    lease = leases[0] if main else None
    if main and config.data.flip and (problem := mirrored_captions(data)):
        reporter.warn(problem)
    diverged = on_main(lambda: divergence.resume(lease, folder, train.on_divergence) if lease else [])
    on_main(lambda: None if diverged else mirror.restore(lease), slow=True)

    # Build the networks and their engines. A resumed run loads its own weights and its own tokenizer, so it does not
    # read `train.init` or `edit.init` again.
    latest = store.load_latest(folder, warn=reporter.warn if main else lambda message: None)
    initial = None if latest else initial or read_initial(config, data.tokenizer)
    init: dict[str, Any] | None = latest.state.get("init") if latest else about(initial) if initial else None
    tokenizer = run_tokenizer(config, data, latest, initial)
    data = replace(data, run_tokenizer=tokenizer)
    initial = with_tokens(initial, tokenizer, train.seed) if initial else None
    on_main(lambda: run_folder.record(folder, f"# {started_from(init)}\n{text}" if init else text, tokenizer.text))
    texts, limit = config.text, config.data.max_tokens
    frozen = read_frozen(texts, tokenizer, limit) if texts.mode == "frozen" else None
    encoder = frozen.build() if frozen is not None else None
    gan, average = assemble(config, tokenizer.vocab_size, device, encoder, initial)

    # Validation: rank 0 reads the protocol first, so that an error is printed only once.
    validation = None
    if config.eval.every_images:
        protocol = on_main(lambda: read_protocol(config.eval))
        validation = Validation(folder, config.eval, protocol, train, data, device, reporter.warn)
        model = partial(ModelFiles, folder, config, tokenizer, frozen=frozen)
        on_main(partial(validation.prepare, config.data, model), slow=True)

    health = Health(train.global_batch, train.divergence_images, fatal=train.on_divergence != "warn")
    parts = gan.engines, average, validation, health, reporter, mirror, watchdog
    checkpointer = Checkpointer(config.checkpoint, train, config.report, lease, latest, init, *parts, folder, diverged)
    images = checkpointer.restore()
    sample_grid = None
    if main:
        prompts = config.report.sample_prompts
        sample_grid = SampleGrid(prompts, data, config.data, config.model, config.edit, train.seed)

    bad_file = folder / "bad_samples.jsonl"

    def stream_from(images: int) -> Stream:
        # Records of bad samples beyond this position are deleted first, because the stream will write them again.
        on_main(lambda: run_folder.cut_bad_samples(bad_file, images))
        return open_stream(
            config.data,
            tokenizer,
            seed=train.seed,
            global_batch=train.global_batch,
            accumulation=config.engine.accumulation,
            edit=config.edit,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            start_images=images,
            bad_file=bad_file,
            data_set=data,
        )

    loop = config.data, train, config.optimizer, config.engine, config.report
    return Trainer(
        folder,
        images,
        *loop,
        stream_from,
        checkpointer,
        gan,
        average,
        validation,
        sample_grid,
        reporter,
        mirror,
        watchdog,
    )


def mirrored_captions(data: ShardSet) -> str:
    """A warning for data.flip=true if training captions say left or right, and "" otherwise. Sets of earlier versions
    do not have the count, and get no warning."""
    captions = data.manifest["splits"].get("train", {}).get("captions", {})
    number, count = captions.get("left_or_right", 0), captions.get("count", 0)
    if not number:
        return ""
    share = f"{number:,} of {count:,} captions ({100 * number / count:.2g}%)"
    return f"{share} contain 'left' or 'right', and data.flip mirrors pictures: set data.flip=false"


def assemble(
    config: Config,
    vocab_size: int,
    device: torch.device,
    frozen: nn.Module | None = None,
    initial: ModelFiles | None = None,
) -> tuple[Gan, Average]:
    """The networks in their engines, and the moving average. All ranks get the same weights.

    The weights are those of `initial`, or else random weights that `train.seed` determines. `frozen` is the given
    encoder of text.mode=frozen. Collective; the process group must exist, and `config.engine.precision` must not be
    `auto`. Raises ConfigError when the batch cannot be divided evenly among the ranks.
    """
    micro_batch = check_world(config, dist.get_world_size())
    torch.manual_seed(config.train.seed)
    frozen = frozen.to(device) if frozen is not None else None
    sizes = {"image_size": config.data.image_size, "max_tokens": config.data.max_tokens, "vocab_size": vocab_size}
    networks = build_networks(config.model, config.text, **sizes, edit_width=config.edit.width, frozen=frozen)
    if initial is not None:
        load_weights(networks, initial)
    average = Average(networks, config.ema, config.train.global_batch, device)  # before the engines split the weights

    def engine(name: str, module: nn.Module, stage: int, rate: float, accumulation: int) -> NetworkEngine:
        scales = dict.fromkeys(("text_g", "text_d", "text"), config.optimizer.text_lr_scale)
        offload = config.engine.offload == "cpu"
        spec = EngineSpec(name, stage, micro_batch, accumulation, config.engine.precision, rate, scales, offload)
        return NetworkEngine(module, spec, config.optimizer, device)

    stages, rates, accumulation = config.engine, config.optimizer, config.engine.accumulation
    d_settings = stages.discriminator_stage, rates.discriminator_lr
    generator = engine("generator", networks.generator, stages.generator_stage, rates.generator_lr, accumulation)
    discriminator = engine("discriminator", networks.discriminator, *d_settings, accumulation)
    text = None
    if networks.text is not None:  # two micro-steps per micro-batch: one for each network's gradient
        text = engine("text", networks.text, *d_settings, 2 * accumulation)
    sections = config.loss, config.augment, config.model, config.train, config.edit
    return Gan(generator, discriminator, text, frozen, *sections), average


def run_tokenizer(config: Config, data: ShardSet, latest: Checkpoint | None, initial: ModelFiles | None) -> Tokenizer:
    """The tokenizer of a resumed run; of a new run, the set's, with the tokens of the `initial` model if there is one.

    In text.mode=frozen the tokenizer is always the set's: the networks read sentence vectors, and the model's tokens
    mean nothing to the given encoder. Raises DataError when the run's tokenizer cannot be read.
    """
    path = Path(config.run.folder) / TOKENIZER
    if latest and (path.exists() or latest.state.get("init")):  # without `init`, the set's tokenizer is the run's
        return Tokenizer.load(path)
    return grown(initial.tokenizer, data.tokenizer) if initial and config.text.mode != "frozen" else data.tokenizer


_SAME = ("model.", "text.mode", "text.encoder", "text.embedding", "text.layers", "text.heads", "data.image_size")
"""Prefixes of the configuration keys that must have the same values in a run and in the model that initializes it."""


def read_initial(config: Config, tokenizer: Tokenizer) -> ModelFiles | None:
    """The model that `train.init` or `edit.init` names, or None if both are empty.

    Raises ConfigError when the model cannot be read, when its networks differ from those of `config`, or, with
    `edit.init`, when its tokenizer differs from that of the training set.
    """
    path = config.train.init or config.edit.init
    if not path:
        return None
    name = "train.init" if config.train.init else "edit.init"
    try:
        files = read_model(path)
    except UserError as error:
        raise ConfigError(f"{name}: {error}", [str(error)]) from None
    same = (*_SAME, "edit.width") if files.config.edit.width and config.edit.width else _SAME
    if config.text.encoder == "transformer" and config.text.mode != "frozen":
        same = (*same, "data.max_tokens")  # the number of learned positions
    changes = differences(files.config, config).items()
    lines = [f"{key}: {here!r} here, {there!r} in the model" for key, (there, here) in changes if key.startswith(same)]
    folder = files.folder
    if lines:
        head = f"{name}: the networks of {folder} differ from those of this run:"
        raise ConfigError("\n  ".join([head, *lines]) + "\nSet these keys to the values of the model.", lines)
    if config.edit.init and files.tokenizer != tokenizer:
        trained = f"edit.init: the tokenizer of {folder} differs from that of data.train"
        line = f"{trained}: train on a set that has the tokenizer of the model, or set train.init instead"
        raise ConfigError(line, [line])
    return files


def load_weights(networks: Networks, files: ModelFiles) -> None:
    """Load a model into fresh networks: the generator's moving average, and the discriminator's last weights.

    If the model has no encoder of source pictures, this encoder keeps its random weights. Raises UserError when the
    tensors of a file do not fit the networks.
    """
    g, d = files.generator, files.discriminator
    sides = [(networks.generator, g), (networks.discriminator, d), (networks.text, d)]
    for side, tensors in sides:
        for name, module in side.named_children() if side is not None else ():
            if name != "source" or files.config.edit.width:
                fill(module, tensors, f"{name}.", files.folder)
