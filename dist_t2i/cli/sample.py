"""Make pictures from texts with a trained model, as one grid with captions.

python tools/sample.py --run RUN "woman pilot dark skin tone" "red apple" --out grid.png
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from dist_t2i.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder or exported model")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: %(default)s)")
    parser.add_argument("--images-per-prompt", type=int, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--truncation", type=float, help="below 1: more typical, less varied (default: the configuration's)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parse()
    from dist_t2i.inference.pipeline import PromptWarning, load
    from dist_t2i.reporting.image_grid import grid_rows, render_grid, save_grid

    model = load(chosen.run, chosen.device)
    count = chosen.images_per_prompt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptWarning)
        pictures = model.generate(chosen.prompts, chosen.seed, count, chosen.truncation)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    rows = grid_rows(chosen.prompts, pictures)
    try:
        save_grid(render_grid(rows, tile=max(128, model.image_size)), chosen.out)
    except OSError as error:
        raise UserError(f"cannot write {chosen.out}: {error.strerror}; name another file with --out") from None
    print(f"{len(pictures)} pictures in {chosen.out} (a row a prompt, seed {chosen.seed})")
    return 0
