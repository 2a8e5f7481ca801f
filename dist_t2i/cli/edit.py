"""Change a picture as a text says, with a model that was trained to (configs/edit-openmoji.yaml).

python tools/edit.py --run RUN --image picture.png "woman pilot dark skin tone" [--strength 0.7] [--out edit.png]
python tools/edit.py evaluate --run RUN [--data SET] [--base RUN]     (see docs/manipulation.md)

The text says what the whole picture shall show, as a caption would. Pictures of any size and format that training reads
will do: transparency goes on white, and the central square is taken, at the model's size.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EVALUATE = "evaluate"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="edit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="what the picture shall show")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder or exported model")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the picture to change")
    parser.add_argument("--out", type=Path, default=Path("edit.png"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="0: the source, 1: the whole edit (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn anew (default: %(default)s)")
    parser.add_argument("--truncation", type=float, help="as in tools/sample.py (default: the configuration's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return parser.parse_args(arguments)


def parse_evaluate(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="edit.py evaluate", description="Edits of held-out pictures beside the trivial answers, with their scores."
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder or exported model")
    parser.add_argument("--data", metavar="SET", help="set with held-out splits (default: the one trained on)")
    parser.add_argument(
        "--base", metavar="DIR", help="model that draws from the text alone (default: what the run began with)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the scores (default: DIR/edit-scores.json)")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="the pictures (default: DIR/edits.png)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == [EVALUATE]:
        return evaluate(parse_evaluate(arguments[1:]))
    return edit(parse(arguments))


def edit(chosen: argparse.Namespace) -> int:
    from dist_t2i.inference.pipeline import PromptWarning, load

    model = load(chosen.run, chosen.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptWarning)
        picture = model.edit(chosen.image, chosen.text, chosen.strength, chosen.seed, chosen.truncation)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    _save(picture, chosen.out)
    print(f"{chosen.image} edited: {chosen.out} ({picture.width}x{picture.height} px, strength {chosen.strength:g})")
    return 0


def evaluate(chosen: argparse.Namespace) -> int:
    from dist_t2i.data.open_data import open_data
    from dist_t2i.eval.scores import table
    from dist_t2i.eval.studies.edits import evaluate_edits, verdict
    from dist_t2i.inference.pipeline import load

    model = load(chosen.run, chosen.device)
    name = chosen.base or model.config.edit.init
    if not name:
        raise UserError(f"{chosen.run} does not say which model it began with; name one that draws with --base")
    base = load(name, chosen.device)
    if not (chosen.data or model.config.data.train):
        raise UserError(f"{chosen.run} does not say what it was trained on; name a set with --data")
    data = open_data(replace(model.config.data, train=chosen.data or model.config.data.train))
    scores, grid = evaluate_edits(model, base, data, say=lambda line: print(line, file=sys.stderr, flush=True))
    out, picture = chosen.out or chosen.run / "edit-scores.json", chosen.grid or chosen.run / "edits.png"
    try:
        scores.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another file with --out") from None
    _save(grid, picture)
    print(table(scores.as_json()))
    print(verdict(scores))
    print(f"written to {out} and {picture}")
    return 0


def _save(picture: Image, path: Path) -> None:
    from dist_t2i.reporting.image_grid import save_grid

    try:
        save_grid(picture, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None
