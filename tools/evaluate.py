"""Score a trained model on the held-out pictures of a set: KID, retrieval, skin tones, each with floor and ceiling.

python tools/evaluate.py --run RUN [--data SET]       (RUN may be an exported folder, too)
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from dist_t2i.errors import UserError, run_command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder or exported model")
    parser.add_argument("--data", metavar="SET", help="set with held-out splits (default: the one trained on)")
    parser.add_argument("--protocol", metavar="NAME", help="openmoji, held-out or quick (default: the one that fits)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the scores go (default: DIR/scores.json)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parse()
    from dist_t2i.data.lists import open_data
    from dist_t2i.eval.protocol import PROTOCOLS, evaluate, protocol_for
    from dist_t2i.eval.scores import table
    from dist_t2i.pipeline import load

    if chosen.protocol and chosen.protocol not in PROTOCOLS:
        raise UserError(f"no protocol {chosen.protocol!r}; there are {', '.join(PROTOCOLS)}")
    model = load(chosen.run, chosen.device)
    if not (chosen.data or model.config.data.train):
        raise UserError(f"{chosen.run} does not say what it was trained on; name a set with --data")
    data = open_data(replace(model.config.data, train=chosen.data or model.config.data.train))
    protocol = PROTOCOLS[chosen.protocol] if chosen.protocol else protocol_for(data)
    scores = evaluate(model, data, protocol, say=lambda line: print(line, file=sys.stderr, flush=True))
    out = chosen.out or chosen.run / "scores.json"
    try:
        scores.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another file with --out") from None
    print(table(scores.as_json()))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
