"""A run folder that is prepared for training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dist_t2i.checkpoint.run_folder import prepare
from dist_t2i.config.files import dump, loads

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from dist_t2i.utils.files import replacing

with replacing(Path(sys.argv[1])) as part:
    part.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_of_killed_writers_are_removed(tmp_path: Path):
    """The files of live processes are kept, and so are new files, which may belong to a process of another machine."""
    (tmp_path / "samples").mkdir()
    for name in ("metrics.jsonl", "samples/images-000000064.png", "new.json"):
        subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path / name], check=False)
    live = tmp_path / f".scores.json.{os.getpid()}.part"
    live.touch()
    (new,) = tmp_path.glob(".new.json.*.part")
    killed = {*tmp_path.rglob(".*.part")} - {live, new}
    assert len(killed) == 2
    for part in (*killed, live):
        os.utime(part, (0, 0))
    prepare(tmp_path, dump(loads("")), {"path": "set", "fingerprint": "f"}, allow_changes=False, warn=print)
    assert {*tmp_path.rglob(".*.part")} == {live, new}
