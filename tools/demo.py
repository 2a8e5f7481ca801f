"""Train a model on OpenMoji and show the results: dist_t2i/cli/demo.py as a program."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dist_t2i.cli import run  # noqa: E402

if __name__ == "__main__":
    run("demo")
