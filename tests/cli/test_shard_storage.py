"""Tars in object storage become a set without being copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from object_store import S3Server, without_aws
from pictures import make_folder
from ranks import ROOT

pytestmark = pytest.mark.slow


def test_indexed_and_verified(tmp_path: Path):
    captions = make_folder(tmp_path / "pictures", 60, kind="jpg")
    with S3Server(tmp_path / "s3") as server:
        environment = {**without_aws(os.environ), **server.environment, "XDG_CACHE_HOME": str(tmp_path / "home")}

        def shard(*arguments: object, status: int = 0) -> str:
            command = [sys.executable, str(ROOT / "tools" / "shard.py"), *map(str, arguments)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == status and "Traceback" not in done.stderr, done.stdout + done.stderr
            return done.stdout

        write = ("folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", 10)
        assert "train: 60 pictures" in shard(*write, "--holdout", 0, "--out", "s3://data/mine")
        tars = "s3://data/mine/train-{00000..00005}.tar"
        assert "train: 60 pictures in 6 tars" in shard("index", tars, "--out", tmp_path / "index")
        assert "all 6 shards" in shard("verify", tmp_path / "index", "--processes", 2)
        hurt = bytearray(server.get("mine/train-00002.tar"))
        hurt[700] ^= 1
        server.put("mine/train-00002.tar", bytes(hurt))
        assert "train-00002.tar" in shard("verify", tmp_path / "index", "--processes", 2, status=1)
