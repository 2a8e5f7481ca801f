"""Edit a picture to match a text, with a model that was trained to edit (configs/edit-openmoji.yaml).

python tools/edit.py --run RUN --image picture.png "woman pilot dark skin tone" [--strength 0.7] [--out edit.png]
python tools/edit.py evaluate --run RUN [--data SET] [--base RUN]     (see docs/manipulation.md)

The text describes the full edited picture, like a caption. The picture may have any size and any format that training
reads. Transparent pixels become white, and the picture's central square is scaled to the model's size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.cli.common import add_model, log, new_parser, open_held_out, prompt_warnings, writing
from dist_t2i.errors import UserError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image


def main() -> int:
    arguments = sys.argv[1:]
    return evaluate(arguments[1:]) if arguments[:1] == ["evaluate"] else edit(arguments)


def edit(arguments: list[str]) -> int:
    parser = new_parser("edit.py", __doc__)
    parser.add_argument("text", help="caption of the edited picture")
    add_model(parser)
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the picture to edit")
    parser.add_argument("--out", type=Path, default=Path("edit.png"), metavar="FILE", help="(default: %(default)s)")
    strength = "from 0 (original picture) to 1 (full edit) (default: %(default)s)"
    parser.add_argument("--strength", type=float, default=1.0, help=strength)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--truncation", type=float, help="as in tools/sample.py (default: from the configuration)")
    args = parser.parse_args(arguments)
    from dist_t2i.inference.pipeline import load
    from dist_t2i.reporting.image_grid import save_grid

    model = load(args.run, args.device)
    with prompt_warnings():
        picture = model.edit(args.image, args.text, args.strength, args.seed, args.truncation)
    with writing(args.out):
        save_grid(picture, args.out)
    print(f"{args.image} edited: {args.out} ({picture.width}x{picture.height} px, strength {args.strength:g})")
    return 0


def evaluate(arguments: list[str]) -> int:
    parser = new_parser("edit.py evaluate", "Edit held-out pictures, and compare their scores with trivial edits.")
    add_model(parser)
    parser.add_argument("--data", metavar="SET", help="set with held-out splits (default: the training set)")
    base_help = "text-to-image model to compare with (default: the run's initial model)"
    parser.add_argument("--base", metavar="DIR", help=base_help)
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the scores (default: DIR/edit-scores.json)")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="file for the pictures (default: DIR/edits.png)")
    args = parser.parse_args(arguments)
    from dist_t2i.eval.scores import table
    from dist_t2i.eval.studies.edits import evaluate_edits, verdict
    from dist_t2i.inference.pipeline import load
    from dist_t2i.reporting.image_grid import save_grid

    model = load(args.run, args.device)
    name = args.base or model.config.edit.init
    if not name:
        raise UserError(f"{args.run} does not name its initial model; name a text-to-image model with --base")
    base = load(name, args.device)
    data = open_held_out(args.run, model.config.data, args.data)
    scores, examples = evaluate_edits(model, base, data, say=log)
    out, picture = args.out or args.run / "edit-scores.json", args.grid or args.run / "edits.png"
    with writing(out):
        scores.save(out)
    with writing(picture, "name another file with --grid"):
        save_grid(render_examples(examples), picture)
    print(table(scores.as_json()))
    print(verdict(scores))
    print(f"written to {out} and {picture}")
    return 0


def render_examples(examples: list[tuple[str, list[numpy.ndarray]]]) -> Image:
    """A grid of the edits that `evaluate_edits` returns."""
    from dist_t2i.reporting.image_grid import GridRow, render_grid

    title = "source, edit, true target, picture generated without source; caption of target (caption of source)"
    return render_grid([GridRow(*example) for example in examples], title=title, tile=64, columns=2)
