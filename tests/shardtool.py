"""Runs tools/shard.py as people do, and looks at what it wrote."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from dist_t2i.data.shards import open_set

ROOT = Path(__file__).parents[1]


def shard(*arguments, check=True, cwd=None, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(ROOT / "tools" / "shard.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)
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
