"""What a model's two text embeddings have learned: nearest words, a map of captions, linear probes with their baselines.

python tools/embeddings.py --run RUN [--data SET] [--out DIR]       (RUN may be an exported folder, too)
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dist_t2i.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="embeddings.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder or exported model")
    parser.add_argument("--data", metavar="SET", help="set whose captions are looked at (default: the one trained on)")
    parser.add_argument("--words", nargs="*", default=[], metavar="WORD", help="whose neighbours to list")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page goes (default: RUN/embeddings)")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parse()
    from dist_t2i.data.open_data import open_data
    from dist_t2i.eval.studies.embeddings import study
    from dist_t2i.inference.pipeline import load
    from dist_t2i.publish import embeddings_page

    model = load(chosen.run)
    if not (chosen.data or model.config.data.train):
        raise UserError(f"{chosen.run} does not say what it was trained on; name a set with --data")
    data = open_data(replace(model.config.data, train=chosen.data or model.config.data.train))
    found = study(model, data, queries=chosen.words)
    out = chosen.out or chosen.run / "embeddings"
    title = f"What the text embeddings of {chosen.run.resolve().name} have learned ({model.images_seen:,} images seen)"
    try:
        page = embeddings_page.write(found, out, title, str(data.manifest.get("credit", "")))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another folder with --out") from None
    except ImportError as error:
        raise UserError(f"the pictures need matplotlib ({error}): pip install 'dist_t2i[eval]'") from None
    if found.probes:
        heads, rows = embeddings_page.probe_rows(found)
        for row in rows:
            print(
                "\n".join(
                    [f"{row[0]}:", *(f"  {head:<32} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True))]
                )
            )
    else:
        print("no probe applies: the captions name no skin tones, genders or frequent objects often enough")
    print(f"look at {page}")
    return 0
