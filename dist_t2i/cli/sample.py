"""Generate pictures from texts with a trained model, as one grid with captions.

python tools/sample.py --run RUN "woman pilot dark skin tone" "red apple" --out grid.png
"""

from __future__ import annotations

from pathlib import Path

from dist_t2i.cli.common import add_model, new_parser, prompt_warnings, writing


def main() -> int:
    parser = new_parser("sample.py", __doc__)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text that describes a picture")
    add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("grid.png"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures (default: %(default)s)")
    parser.add_argument("--images-per-prompt", type=int, default=4, metavar="N", help="(default: %(default)s)")
    truncation = "factor of the noise; below 1, pictures are typical but less varied (default: from the run)"
    parser.add_argument("--truncation", type=float, help=truncation)
    args = parser.parse_args()
    from dist_t2i.inference.pipeline import load
    from dist_t2i.reporting.image_grid import grid_rows, render_grid, save_grid

    model = load(args.run, args.device)
    with prompt_warnings():
        pictures = model.generate(args.prompts, args.seed, args.images_per_prompt, args.truncation)
    with writing(args.out):
        save_grid(render_grid(grid_rows(args.prompts, pictures), tile=max(128, model.image_size)), args.out)
    print(f"{len(pictures)} pictures in {args.out} (one row per prompt, seed {args.seed})")
    return 0
