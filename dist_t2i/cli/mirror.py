"""Read a mirror of checkpoints.

python tools/mirror.py look URL                    prints the run to which the mirror belongs, and its checkpoints
python tools/mirror.py fetch URL IMAGES FOLDER     copies the checkpoint after IMAGES images and verifies its checksums

The answer is one line of JSON, which docs/checkpoints.md describes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dist_t2i.checkpoint import mirror_worker


def main() -> int:
    """Returns the exit status 0, even if the mirror fails, because the answer then contains the reason."""
    parser = argparse.ArgumentParser(
        prog="mirror.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("look", help="print the run to which the mirror belongs, and its checkpoints")
    fetch = commands.add_parser("fetch", help="copy one checkpoint")
    for command in (look, fetch):
        command.add_argument("url", metavar="URL")
        command.add_argument("--patience", type=float, default=30.0, help="seconds to wait for an answer (%(default)s)")
    fetch.add_argument("images", type=int, metavar="IMAGES", help="images seen at the checkpoint")
    fetch.add_argument("folder", type=Path, metavar="FOLDER")
    print(json.dumps(mirror_worker.answer(**vars(parser.parse_args()))), flush=True)
    return 0
