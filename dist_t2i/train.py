"""Train a text-to-image GAN: the entry point, under any launcher.

    deepspeed dist_t2i/train.py                         (trains on scenes, which are rendered on first use)
    deepspeed dist_t2i/train.py --config configs/openmoji64.yaml [section.key=value ...]
    torchrun --nproc-per-node 2 dist_t2i/train.py --config ...
    srun python dist_t2i/train.py --config ...
    python dist_t2i/train.py --config ...

A repeated command continues from the newest checkpoint. Exit statuses: 0 finished; 1 training failed; 2 the
configuration, data or environment must be corrected, as the message says; 75 a signal stopped the run, which saved a
checkpoint; 76 another process has taken over the run; 77 a rank hung; 78 training diverged; 130 a second
Ctrl-C ended the run at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Python puts the folder of a script first on sys.path. Here this folder is the package `dist_t2i`, whose subpackages
# (`config`, ...) would hide installed packages of the same names. So the next line puts the parent folder of `dist_t2i`
# first instead.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dist_t2i.errors import ConfigError, TrainingError, UserError, run_command  # noqa: E402

if TYPE_CHECKING:
    from dist_t2i.distributed.preemption import StopFlag


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=plain)
    parser.add_argument("--config", type=Path, help="YAML file with the configuration; missing keys get their defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    changes = "resume a run even if its configuration or data has changed"
    parser.add_argument("--allow-changes", action="store_true", help=changes)
    parser.add_argument("--help-config", action="store_true", help="print every key with its default, and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds this option
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None, *, stop: StopFlag | None = None) -> int:
    """Returns the exit status. For `stop` see `training.setup.train`. Raises UserError."""
    options = parse(arguments)
    if options.help_config:
        from dist_t2i.config.fields import reference

        print(reference())
        return 0
    from dist_t2i.config import files as config_files
    from dist_t2i.config.validation import check_world
    from dist_t2i.distributed import launch
    from dist_t2i.sharding import built_in

    rank = launch.prepare()
    try:
        path = options.config or built_in.default_config(launch.has_gpu())
        config = config_files.load(path, options.overrides)
        if options.config is None and rank.rank == 0:
            print(built_in.choice(path, config.data.train), flush=True)
        if not config.run.folder:
            folder = str(Path("runs") / path.stem)
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder=folder))
        check_world(config, rank.world_size)
        built_in.write_missing(config.data.train, config.data.image_size)
        from dist_t2i.training.setup import train

        return train(config, rank, allow_changes=options.allow_changes, stop=stop)
    except UserError as error:
        same_everywhere = isinstance(error, (ConfigError, TrainingError))  # so only rank 0 needs to print the error
        error.reported_by_main = error.reported_by_main or (rank.rank > 0 and same_everywhere)
        raise


if __name__ == "__main__":
    sys.exit(run_command(main))
