"""Score a trained model by a frozen protocol (each score with interval, floor and ceiling), or compare two score files.

python tools/evaluate.py --run RUN [--data SET] [--protocol NAME]    RUN: a run, a checkpoint or an exported model
torchrun --nproc-per-node 4 -- tools/evaluate.py --run RUN ...       equal scores from four processes
python tools/evaluate.py compare A.json B.json                       the scores of two files, if comparable
python tools/evaluate.py captions --data SET --protocol NAME         the captions that a protocol selects from a set

docs/evaluation.md describes the protocols, the metrics, and the supply of weights for Inception and CLIP.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.cli.common import add_model, log, new_parser, open_held_out, writing
from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.eval.judges.features import FeatureNetwork
    from dist_t2i.eval.protocol import Protocol
    from dist_t2i.eval.ranks import Ranks
    from dist_t2i.eval.selection import Selection
    from dist_t2i.inference.pipeline import TextToImage

_NETWORKS = ("efficientnet", "inception", "clip", "scenes")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments and arguments[0] in ("compare", "captions") else ""
    parser = new_parser(f"evaluate.py {verb}".strip(), __doc__)
    if verb == "compare":
        parser.add_argument("scores", type=Path, nargs=2, metavar="SCORES.json")
    elif verb == "captions":
        parser.add_argument("--data", required=True, metavar="SET", help="set with the split that the protocol names")
        parser.add_argument("--protocol", required=True, metavar="NAME", help="name, or a .yaml file")
        parser.add_argument("--out", type=Path, metavar="FILE", help="(default: NAME-captions.txt)")
    else:
        add_model(parser)
        parser.add_argument("--data", metavar="SET", help="set with held-out splits (default: the training set)")
        names = "scenes, openmoji, openmoji-ablation, held-out, quick, coco30k, cub, flowers"
        protocol = f"{names}, or a .yaml file (default: scenes or openmoji for such sets, otherwise held-out)"
        parser.add_argument("--protocol", metavar="NAME", help=protocol)
        weights = "path or URL of the weights of inception or clip (default: download them)"
        parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE", help=weights)
        without = f"leave out the metrics of one of the networks {', '.join(_NETWORKS)}"
        parser.add_argument("--without", action="append", default=[], metavar="NETWORK", help=without)
        parser.add_argument("--out", type=Path, metavar="FILE", help="(default: scores.json in the run folder)")
    args = parser.parse_args(arguments[1:] if verb else arguments)
    args.verb = verb
    return args


def main() -> int:
    args = parse()
    if args.verb == "compare":
        return compare(*args.scores)
    if args.verb == "captions":
        return captions(args)
    from dist_t2i.distributed import launch

    environment = dict(os.environ)
    rank = launch.prepare(environment)
    if rank.world_size > 1:
        os.environ.update(environment)  # before torch is imported
    from dist_t2i.eval.ranks import Ranks

    ranks = Ranks.join(rank.rank, rank.world_size)
    try:
        evaluation(args, ranks, rank.local_rank)
    except UserError:  # all ranks raise this error, so no rank waits for another
        ranks.leave()
        raise
    ranks.leave()
    return 0


def evaluation(args: argparse.Namespace, ranks: Ranks, local_rank: int) -> None:
    """Collective: computes the scores, writes them to a file and prints them. A UserError is raised on all ranks."""
    from dist_t2i.eval.evaluate import evaluate, load_networks, select_all
    from dist_t2i.eval.scores import table

    model, data, protocol, weights = ranks.all(lambda: _inputs(args, local_rank, ranks.world))
    rows = select_all(data, protocol, ranks)
    run = model.files.folder
    ranks.from_main(lambda: keep_captions(run, protocol, rows))
    networks: dict[str, FeatureNetwork] = {}

    def load() -> None:
        networks.update(load_networks(protocol, model.device, weights, args.without, model.image_size))

    ranks.from_main(load)  # rank 0 may download files, which the other ranks then load from the disk
    ranks.all(lambda: None if ranks.main else load())
    scores = evaluate(model, data, protocol, say=log, networks=networks, ranks=ranks, selections=rows)
    name = "scores.json" if args.run.samefile(run) else f"scores-{args.run.resolve().name}.json"
    out = args.out or run / name

    def write() -> None:
        with writing(out):
            scores.save(out)

    ranks.from_main(write)
    if ranks.main:
        print(table(scores.as_json()))
        if left_out := scores.manifest["left_out"]:
            print(f"left out: {', '.join(left_out)}")
        print(f"written to {out}")


def _inputs(
    args: argparse.Namespace, local_rank: int, world: int
) -> tuple[TextToImage, ShardSet, Protocol, dict[str, str]]:
    """The model, the set, the protocol, and the paths or URLs of weights. Raises UserError."""
    from dist_t2i.eval.evaluate import protocol_for
    from dist_t2i.eval.protocol import load_protocol
    from dist_t2i.inference.model_files import read_model
    from dist_t2i.inference.pipeline import TextToImage

    protocol = load_protocol(args.protocol) if args.protocol else None
    weights = _weights(args.weights, args.without)
    files = read_model(args.run, ema=protocol is None or protocol.ema)
    data = open_held_out(args.run, files.config.data, args.data)
    model = TextToImage(files, _device(args.device, local_rank, world))
    return model, data, protocol or protocol_for(data), weights


def _device(requested: str | None, local_rank: int, world: int) -> str | None:
    """The device for this rank, or None for the model's default. Raises UserError if `requested` cannot be used."""
    import torch

    if requested:
        try:
            torch.empty(0, device=requested)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"--device {requested}: cannot be used ({reason}); try cpu") from None
        return requested
    if world == 1:
        return None
    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _weights(options: list[str], without: list[str]) -> dict[str, str]:
    """Paths or URLs by network, from the options NETWORK=FILE. Raises UserError, also for the networks in `without`."""
    weights = {}
    for text in options:
        network, equals, path = text.partition("=")
        if network not in ("inception", "clip") or not (equals and path):
            raise UserError(f"--weights {text}: expected inception=FILE or clip=FOLDER, or a URL instead of the path")
        weights[network] = path
    for network in without:
        if network not in _NETWORKS:
            raise UserError(f"--without {network}: expected one of {', '.join(_NETWORKS)}")
    return weights


def _checked_hash(protocol: Protocol, rows: Mapping[str, Selection]) -> str:
    """The hash of the selected captions. Raises UserError if the protocol has another hash."""
    from dist_t2i.eval.evaluate import captions_hash

    digest = captions_hash(rows)
    if protocol.captions_sha256 not in ("", digest):
        raise UserError(
            f"the captions that protocol {protocol.name} version {protocol.version} selects from this set differ from "
            f"the frozen captions (hash {digest[:12]}…, expected {protocol.captions_sha256[:12]}…)"
        )
    return digest


def keep_captions(run: Path, protocol: Protocol, rows: Mapping[str, Selection]) -> None:
    """Writes the selected captions to the run's folder, unless the protocol contains their hash.

    Raises UserError if an earlier evaluation by this protocol had other captions, or if the captions' hash differs from
    the protocol's hash.
    """
    from dist_t2i.eval.protocol import captions_text

    _checked_hash(protocol, rows)
    if protocol.captions_sha256:
        return
    path = run / f"captions-{protocol.name}-{protocol.version}.txt"
    text = captions_text({split: part.rows() for split, part in rows.items()})
    try:
        if not path.exists():
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path}: these captions of an earlier evaluation differ from the captions that {protocol.name} "
                "selects from this set. Name the earlier set with --data, or delete this file"
            )
    except OSError as error:
        log(f"warning: {path}: {error.strerror}; the captions were not saved")


def captions(args: argparse.Namespace) -> int:
    """Writes the list of captions, and prints the hash of this list."""
    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.open_data import open_data
    from dist_t2i.eval.evaluate import select_all
    from dist_t2i.eval.protocol import captions_text, load_protocol

    protocol = load_protocol(args.protocol)
    rows = select_all(open_data(DataConfig(train=args.data)), protocol)
    digest, out = _checked_hash(protocol, rows), args.out or Path(f"{protocol.name}-captions.txt")
    with writing(out):
        out.write_text(captions_text({split: part.rows() for split, part in rows.items()}), encoding="utf-8")
    for split, part in rows.items():
        print(f"{split}: {len(part):,} pictures, {len(part.rows()):,} captions")
    print(f"sha256 {digest}\nwritten to {out}")
    return 0


def compare(first: Path, second: Path) -> int:
    """Prints the scores of two files next to each other; returns 1 if the scores are not comparable."""
    from dist_t2i.eval.compare import differences, table
    from dist_t2i.eval.scores import read_scores

    a, b = read_scores(first), read_scores(second)
    print(table(a, b, (str(first), str(second))))
    return 1 if differences(a, b) else 0
