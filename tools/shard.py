"""Write captioned pictures as WebDataset shards: see dist_t2i/sharding/cli.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from dist_t2i.errors import run_command  # noqa: E402
from dist_t2i.sharding.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main))
