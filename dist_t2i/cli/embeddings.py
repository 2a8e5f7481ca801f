"""Study a model's two text embeddings with nearest words, a map of captions, and linear probes with baselines.

python tools/embeddings.py --run RUN [--data SET] [--out DIR]       (RUN may also be an exported folder)
"""

from __future__ import annotations

from pathlib import Path

from dist_t2i.cli.common import add_model, new_parser, open_held_out, writing
from dist_t2i.errors import UserError


def main() -> int:
    parser = new_parser("embeddings.py", __doc__)
    add_model(parser, device=False)
    parser.add_argument("--data", metavar="SET", help="set of the captions (default: the training set)")
    parser.add_argument("--words", nargs="*", default=[], metavar="WORD", help="words whose nearest words are listed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the page (default: RUN/embeddings)")
    args = parser.parse_args()
    from dist_t2i.eval.studies.embeddings import study
    from dist_t2i.inference.pipeline import load
    from dist_t2i.publish import embeddings_page

    model = load(args.run)
    data = open_held_out(args.run, model.config.data, args.data)
    results = study(model, data, queries=args.words)
    out = args.out or args.run / "embeddings"
    title = f"What the text embeddings of {args.run.resolve().name} have learned ({model.images_seen:,} images seen)"
    try:
        with writing(out, "name another folder with --out"):
            page = embeddings_page.write(results, out, title, str(data.manifest.get("credit", "")))
    except ImportError as error:
        raise UserError(f"the pictures need matplotlib ({error}): pip install 'dist_t2i[eval]'") from None
    if results.probes:
        heads, rows = embeddings_page.probe_rows(results)
        for name, *cells in rows:
            print(f"{name}:", *(f"  {head:<32} {cell}" for head, cell in zip(heads[1:], cells, strict=True)), sep="\n")
    else:
        print("no probes: skin tones, genders and frequent objects are too rare in the captions")
    print(f"page: {page}")
    return 0
