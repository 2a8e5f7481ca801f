"""Read a mirror of checkpoints: dist_t2i/cli/mirror.py as a program."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dist_t2i.cli import run  # noqa: E402

if __name__ == "__main__":
    run("mirror")
