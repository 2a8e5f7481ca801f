"""Parts that several commands use: options, sets, warnings and error messages. This module is fast to import."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.shard_set import ShardSet

ROOT = Path(__file__).resolve().parents[2]


def new_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `command`, whose --help keeps the line breaks of `description`."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=command, description=description, formatter_class=form)


def add_model(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Adds the option --run, and with `device` the option --device."""
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run folder, checkpoint or exported model"
    )
    if device:
        parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if available)")


def say(line: str) -> None:
    print(line, flush=True)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_held_out(run: Path, config: DataConfig, name: str | None) -> ShardSet:
    """The set `name` (default: the training set of the model in `run`). Raises UserError."""
    from dist_t2i.data.open_data import open_data

    if not (name or config.train):
        raise UserError(f"{run} does not name a training set; name a set with --data")
    return open_data(replace(config, train=name or config.train))


def write_built_in_set(name: str, folder: Path, size: int) -> None:
    """Writes the set `openmoji` or `scenes` with tools/shard.py. Raises UserError."""
    from dist_t2i.sharding.built_in import SCENES

    count = ["--count", str(SCENES)] if name == "scenes" else []
    tool = str(ROOT / "tools" / "shard.py")
    command = [sys.executable, tool, name, *count, "--size", str(size), "--out", str(folder)]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(f"tools/shard.py failed (exit status {status}); see the error above")


@contextlib.contextmanager
def writing(path: Path, remedy: str = "name another file with --out") -> Iterator[None]:
    """A context that replaces an OSError with a UserError, which names the path and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from None


@contextlib.contextmanager
def prompt_warnings() -> Iterator[None]:
    """Prints warnings about prompts on stderr, one line each."""
    from dist_t2i.inference.pipeline import PromptWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptWarning)
        yield
    for warning in caught:
        log(f"warning: {warning.message}")
