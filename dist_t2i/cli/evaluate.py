"""Score a trained model by a frozen protocol, every number with interval, floor and ceiling; or compare two scores.

python tools/evaluate.py --run RUN [--data SET] [--protocol NAME]    (RUN may be an exported folder, or a checkpoint's)
torchrun --nproc-per-node 4 -- tools/evaluate.py --run RUN ...          the same numbers, sooner
python tools/evaluate.py compare A.json B.json                       side by side, or why not
python tools/evaluate.py captions --data SET --protocol NAME         the list of captions that a protocol draws from a set

docs/evaluation.md has the protocols, the metrics, and how to supply the weights of Inception and CLIP.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.eval.judges.features import FeatureNetwork
    from dist_t2i.eval.protocol import Protocol
    from dist_t2i.eval.ranks import Ranks
    from dist_t2i.eval.selection import Selection
    from dist_t2i.inference.pipeline import TextToImage

_NETWORKS = ("efficientnet", "inception", "clip")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments and arguments[0] in ("compare", "captions") else ""
    parser = argparse.ArgumentParser(
        prog=f"evaluate.py {verb}".strip(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if verb == "compare":
        parser.add_argument("scores", type=Path, nargs=2, metavar="SCORES.json")
    elif verb == "captions":
        parser.add_argument("--data", required=True, metavar="SET", help="set with the split that the protocol names")
        parser.add_argument("--protocol", required=True, metavar="NAME", help="name, or a .yaml file")
        parser.add_argument("--out", type=Path, metavar="FILE", help="(default: NAME-captions.txt)")
    else:
        _evaluation_options(parser)
    chosen = parser.parse_args(arguments[1:] if verb else arguments)
    chosen.verb = verb
    return chosen


def _evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run folder, checkpoint or exported model"
    )
    parser.add_argument("--data", metavar="SET", help="set with held-out splits (default: the one trained on)")
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="openmoji, held-out, quick, coco30k, cub, flowers, or a .yaml file (default: the one that fits)",
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NETWORK=FILE",
        help="path or URL of the weights of inception or clip (default: downloaded)",
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="NETWORK", help="leave out what inception or clip judges"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where the scores go (default: scores.json in the run folder)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


def main() -> int:
    chosen = parse()
    if chosen.verb == "compare":
        return compare(*chosen.scores)
    if chosen.verb == "captions":
        return captions(chosen)
    from dist_t2i.distributed import launch

    environment = dict(os.environ)
    rank = launch.prepare(environment)
    if rank.world_size > 1:
        os.environ.update(environment)  # before torch is imported
    from dist_t2i.eval.ranks import Ranks

    ranks = Ranks.join(rank.rank, rank.world_size)
    try:
        evaluation(chosen, ranks, rank.local_rank)
    except UserError:  # of all ranks together
        ranks.leave()
        raise
    ranks.leave()
    return 0


def evaluation(chosen: argparse.Namespace, ranks: Ranks, local_rank: int) -> None:
    """Scores to a file and to the terminal. Collective; a UserError is raised on all ranks."""
    from dist_t2i.eval.evaluate import evaluate, load_networks, select_all
    from dist_t2i.eval.scores import table

    model, data, protocol, sources = ranks.all(lambda: opened(chosen, local_rank, ranks.world))
    rows = select_all(data, protocol, ranks)
    run = model.files.folder
    ranks.from_main(lambda: keep_captions(run, protocol, rows))
    judges: dict[str, FeatureNetwork] = {}

    def load() -> None:
        judges.update(load_networks(protocol, model.device, sources, chosen.without))

    ranks.from_main(load)  # first one of them, which may have to download
    ranks.all(lambda: None if ranks.main else load())

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    scores = evaluate(model, data, protocol, say=say, networks=judges, ranks=ranks, selections=rows)
    out = chosen.out or run / (
        "scores.json" if chosen.run.samefile(run) else f"scores-{chosen.run.resolve().name}.json"
    )

    def write() -> None:
        try:
            scores.save(out)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; name another file with --out") from None

    ranks.from_main(write)
    if ranks.main:
        print(table(scores.as_json()))
        if left_out := scores.manifest["left_out"]:
            print(f"left out: {', '.join(left_out)}")
        print(f"written to {out}")


def opened(
    chosen: argparse.Namespace, local_rank: int, world: int
) -> tuple[TextToImage, ShardSet, Protocol, dict[str, str]]:
    """The model, the set, the protocol, and where weights come from, as the command line says."""
    from dist_t2i.data.open_data import open_data
    from dist_t2i.eval.evaluate import protocol_for
    from dist_t2i.eval.protocol import load_protocol
    from dist_t2i.inference.model_files import read_model
    from dist_t2i.inference.pipeline import TextToImage

    protocol = load_protocol(chosen.protocol) if chosen.protocol else None
    sources = _sources(chosen.weights, chosen.without)
    files = read_model(chosen.run, ema=protocol is None or protocol.ema)
    if not (chosen.data or files.config.data.train):
        raise UserError(f"{chosen.run} does not say what it was trained on; name a set with --data")
    data = open_data(replace(files.config.data, train=chosen.data or files.config.data.train))
    model = TextToImage(files, _device(chosen.device, local_rank, world))
    return model, data, protocol or protocol_for(data), sources


def _device(asked: str | None, local_rank: int, world: int) -> str | None:
    """What was asked for, if it is there; with several ranks on GPUs, each has its own."""
    import torch

    if asked:
        try:
            torch.empty(0, device=asked)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"--device {asked}: cannot be used ({reason}); try cpu") from None
        return asked
    if world == 1:
        return None
    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _sources(given: list[str], without: list[str]) -> dict[str, str]:
    """--weights NETWORK=WHERE as a dictionary."""
    found = {}
    for text in given:
        network, equals, where = text.partition("=")
        if network not in ("inception", "clip") or not (equals and where):
            raise UserError(f"--weights {text}: expected inception=FILE or clip=FOLDER (or URLs of these)")
        found[network] = where
    for network in without:
        if network not in _NETWORKS:
            raise UserError(f"--without {network}: there are {', '.join(_NETWORKS)}")
    return found


def keep_captions(run: Path, protocol: Protocol, rows: Mapping[str, Selection]) -> None:
    """Beside a run's scores lie the captions they are about, where the protocol does not list them: the next ones must be
    the same. Raises UserError when they are not."""
    from dist_t2i.eval.evaluate import captions_hash
    from dist_t2i.eval.protocol import captions_text

    found = captions_hash(rows)
    if protocol.captions_sha256:
        if found != protocol.captions_sha256:
            raise UserError(
                f"the captions that protocol {protocol.name} version {protocol.version} finds in this set are not the "
                f"ones it was frozen with (their hash is {found[:12]}…, not {protocol.captions_sha256[:12]}…)"
            )
        return
    path = run / f"captions-{protocol.name}-{protocol.version}.txt"
    text = captions_text({split: part.rows() for split, part in rows.items()})
    try:
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path}: this run was evaluated with other captions than protocol {protocol.name} finds in this set. "
                "Name the set that was used (--data), or delete the file to begin anew"
            )
        if not path.exists():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"warning: {path}: {error.strerror}; the captions are not kept", file=sys.stderr)


def captions(chosen: argparse.Namespace) -> int:
    """Write the list and say its hash."""
    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.open_data import open_data
    from dist_t2i.eval.evaluate import captions_hash, select_all
    from dist_t2i.eval.protocol import captions_text, load_protocol

    protocol = load_protocol(chosen.protocol)
    rows = select_all(open_data(DataConfig(train=chosen.data)), protocol)
    out = chosen.out or Path(f"{protocol.name}-captions.txt")
    found = captions_hash(rows)
    if protocol.captions_sha256 and found != protocol.captions_sha256:
        raise UserError(f"these are not the captions of {protocol.name} version {protocol.version}: hash {found}")
    try:
        out.write_text(captions_text({split: part.rows() for split, part in rows.items()}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another file with --out") from None
    for split, part in rows.items():
        print(f"{split}: {len(part):,} pictures, {len(part.rows()):,} captions")
    print(f"sha256 {found}\nwritten to {out}")
    return 0


def compare(first: Path, second: Path) -> int:
    """Both scores side by side; 1 when they cannot be compared."""
    from dist_t2i.eval.compare import differences, table
    from dist_t2i.eval.scores import read_scores

    a, b = read_scores(first), read_scores(second)
    print(table(a, b, (str(first), str(second))))
    return 1 if differences(a, b) else 0
