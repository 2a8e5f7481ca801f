"""Train a text-to-image GAN: the entry point, under any launcher.

    deepspeed dist_t2i/train.py --config configs/openmoji64.yaml [section.key=value ...]
    torchrun --nproc-per-node 2 dist_t2i/train.py --config ...
    srun python dist_t2i/train.py --config ...
    python dist_t2i/train.py --config ...

Run the same command again to go on from the newest checkpoint. Exit statuses: 0 finished; 75 stopped by a signal with a
checkpoint saved; 2 something to mend, said in one message; 1 training broke down; 76 another process has taken the run
over; 77 a rank hung; 130 second Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# A script's own folder comes first on sys.path, where modules of this package would pass for others' (`config`, ...).
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dist_t2i.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from dist_t2i.config.sections import Config
    from dist_t2i.distributed.launch import Rank
    from dist_t2i.distributed.preemption import StopFlag


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file of the run; what it leaves out has defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="go before the file's values")
    parser.add_argument(
        "--allow-changes", action="store_true", help="go on with a run although its configuration or data changed"
    )
    parser.add_argument("--help-config", action="store_true", help="list every key with its default, and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None, *, stop: StopFlag | None = None) -> int:
    """Returns the exit status; `stop` as in `train`. Raises UserError."""
    options = parse(arguments)
    if options.help_config:
        from dist_t2i.config.fields import reference

        print(reference())
        return 0
    from dist_t2i.config import files as config_files
    from dist_t2i.distributed import launch

    rank = launch.prepare()
    try:
        if options.config is None:
            raise UserError("--config FILE is missing, such as --config configs/openmoji64.yaml")
        config = config_files.load(options.config, options.overrides)
        if not config.run.folder:
            folder = str(Path("runs") / options.config.stem)
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder=folder))
        from dist_t2i.config.validation import check_world

        check_world(config, rank.world_size)
        return train(config, rank, allow_changes=options.allow_changes, stop=stop)
    except UserError as error:
        error.told_by_main = error.told_by_main or (rank.rank > 0 and _same_everywhere(error))
        raise


def train(config: Config, rank: Rank, *, allow_changes: bool = False, stop: StopFlag | None = None) -> int:
    """Train as one rank of a run until `train.total_images` are seen or a signal asks to stop; returns the exit status.

    Continues from the newest checkpoint in the run folder. `stop` is a flag that the caller has already installed, so that
    no signal is lost while this package is imported. Raises UserError.
    """
    import torch
    import torch.distributed as dist

    from dist_t2i.distributed.engine import init_distributed
    from dist_t2i.distributed.launch import has_gpu
    from dist_t2i.distributed.preemption import StopFlag
    from dist_t2i.distributed.watchdog import Watchdog
    from dist_t2i.training.setup import build_run
    from dist_t2i.training.trainer import Trainer

    device = torch.device("cuda", rank.local_rank) if has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The flag stays installed until the process ends: a late signal must not change the exit status.
    stop = stop or StopFlag(announce=rank.rank == 0).install()
    watchdog = Watchdog(Path(config.run.folder), rank.rank, rank.world_size, config.train.hang_seconds).start()
    init_distributed(device)
    try:
        trainer = Trainer(build_run(config, device, watchdog, allow_changes=allow_changes))
        status = trainer.run(stop)
    finally:
        watchdog.stop()
        with contextlib.suppress(Exception):  # after an error the other ranks may be gone, and the error matters more
            dist.destroy_process_group()
    trainer.parts.mirror.finish(status, stop)  # the other ranks need not wait for the upload
    return status


def _same_everywhere(error: UserError) -> bool:
    """Whether every rank comes to this error by itself, so that rank 0's word is enough."""
    from dist_t2i.errors import ConfigError, TrainingError

    return isinstance(error, (ConfigError, TrainingError))


if __name__ == "__main__":
    from dist_t2i.errors import run_command

    sys.exit(run_command(main))
