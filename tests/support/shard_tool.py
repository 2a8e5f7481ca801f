"""Runs tools/shard.py as users do, and reads its output."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

from dist_t2i.data.shard_set import open_set
from prefork import Program

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "shard.py"
_STEPS = (
    "sharding.sources.tables",
    "sharding.sources.webdataset_tars",
    "sharding.write_set",
    "sharding.inspect_set",
    "sharding.slurm_array",
)
_PROGRAM = Program(TOOL, *(f"dist_t2i.{step}" for step in _STEPS), "dist_t2i.data.indexing", "tokenizers")


def shard(*arguments, check=True, cwd=None, **environment):
    """Runs the tool; returns its output and exit status. It must print no traceback, and succeed unless `check` is
    false."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    process = _PROGRAM.start(*map(str, arguments), environment=environment, cwd=cwd)
    out, err = process.communicate(timeout=300)
    done = subprocess.CompletedProcess(arguments, process.returncode, out, err)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def contents(folder):
    """Name -> sha256 of every visible file of a set."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def problems(folder):
    """(where, picture, reason) of every line of bad_samples.jsonl."""
    lines = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    return {(line["where"], line["picture"], line["reason"]) for line in lines}


def reasons(folder):
    """(picture or where, reason) of every line of bad_samples.jsonl."""
    return {(picture or where, reason) for where, picture, reason in problems(folder)}


def captions_by_key(folder, split=None):
    data_set = open_set(folder)
    splits = [split] if split else data_set.splits
    return {sample.key: sample.captions for split in splits for sample in data_set.samples(split)}
