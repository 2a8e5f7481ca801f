"""Export the newest checkpoint of a run as a folder that others can use: weights, configuration, tokenizer, model card.

python tools/export.py --run RUN --out DIR       then, anywhere: dist_t2i.load("DIR").generate(["..."])
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder (or an export, to copy it)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --out")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parse()
    from dist_t2i.publish.export import export

    out = export(chosen.run, chosen.out, replace=chosen.force)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"exported to {out} ({size / 1e6:.1f} MB): {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0
