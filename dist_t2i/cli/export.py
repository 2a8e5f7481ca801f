"""Export a run's newest checkpoint as a folder to share: weights, configuration, tokenizer, model card.

python tools/export.py --run RUN --out DIR       then, anywhere: dist_t2i.load("DIR").generate(["..."])
"""

from __future__ import annotations

from pathlib import Path

from dist_t2i.cli.common import new_parser


def main() -> int:
    parser = new_parser("export.py", __doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder, or exported model to copy")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --out")
    args = parser.parse_args()
    from dist_t2i.publish.export import export

    files = sorted(export(args.run, args.out, replace=args.force).iterdir())
    size = sum(path.stat().st_size for path in files)
    print(f"exported to {args.out} ({size / 1e6:.1f} MB): {', '.join(path.name for path in files)}")
    return 0
