"""Following a protocol: from a model and a set to scores that can be compared, with all that they depend on.

`rules.py` says what a protocol fixes, `selection.py` finds its captions, `measure.py` makes and judges the pictures,
`scoring.py` computes the numbers. Works alone or on several ranks, with the same result.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.eval.judges.features import FeatureNetwork, load_features, own_judge
from dist_t2i.eval.measure import measure
from dist_t2i.eval.protocol import Protocol, captions_sha256, load_protocol, rules_sha256
from dist_t2i.eval.ranks import ALONE, Ranks
from dist_t2i.eval.scores import Scores, SplitScores
from dist_t2i.eval.scoring import scores_of
from dist_t2i.eval.selection import Chosen, choose, has_listed, splits_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

Say = Callable[[str], None]


def protocol_for(data: ShardSet) -> Protocol:
    """The protocol that fits a set: `openmoji` if it holds the pictures that this lists, else `held-out`."""
    listed = load_protocol("openmoji")
    return listed if has_listed(data, listed) else load_protocol("held-out")


def evaluate(
    model: TextToImage,
    data: ShardSet,
    protocol: Protocol,
    *,
    say: Say = print,
    judges: Mapping[str, FeatureNetwork] | None = None,
    ranks: Ranks = ALONE,
    chosen: Mapping[str, Chosen] | None = None,
    seen: Mapping[str, dict[str, Tensor]] | None = None,
) -> Scores:
    """The scores of a model on the held-out splits of a set, on every rank; `say` gets a line of progress now and then.

    Without `judges`, the protocol's are loaded; a metric whose judge is not among them is left out, and the manifest says
    so. `chosen`: what `choose_all` gave, where it was asked before. `seen` (split -> an empty dictionary at first) keeps
    what the judges made of the real pictures for the next call. Collective.
    Raises UserError when the set has no such split, too few pictures, or not those that the protocol lists. Takes about
    0.1 s a picture and seed on one core at 32 px, nearly all of it in the judge.
    """
    chosen = chosen or choose_all(data, protocol, ranks)
    judges = dict(judges if judges is not None else load_judges(protocol, model.device))
    if "own" in {network for _, network in protocol.wanted}:
        judges.setdefault("own", own_judge(model))
    used = {name: judge for name, judge in judges.items() if name in {network for _, network in protocol.wanted}}
    measured = {}
    for split, rows in chosen.items():
        if ranks.main:
            named = ", ".join(judge.name for judge in used.values())
            say(f"{split}: {len(rows)} pictures, captions x seeds: {_made(rows, protocol):,}; judged by {named}")
        measured[split] = measure(model, rows, protocol, used, ranks, seen[split] if seen else None)

    def scores() -> Scores:
        say("all pictures are judged; computing the metrics and their intervals")
        parts = {split: part for split, part in measured.items() if part is not None}
        found = {
            split: SplitScores(len(part.captions), scores_of(part, protocol, used)) for split, part in parts.items()
        }
        about = manifest(model, data, protocol, used) | {
            "truncation": model.config.model.generator.truncation
            if protocol.truncation is None
            else protocol.truncation,
            "color_sharpness": model.config.model.generator.color_sharpness,
            "captions_sha256": captions_hash(chosen),
            "reference_sha256": {split: part.reference_sha256 for split, part in parts.items()},
            "left_out": [f"{metric}/{network}" for metric, network in protocol.wanted if network not in {"", *used}],
        }
        return Scores(dataclasses.asdict(protocol), about, found)

    return ranks.from_main(scores)


def choose_all(data: ShardSet, protocol: Protocol, ranks: Ranks = ALONE) -> dict[str, Chosen]:
    """Split -> its pictures and captions. Collective. Raises UserError."""
    splits = ranks.all(lambda: splits_of(data, protocol))
    return {split: choose(data, split, protocol, ranks) for split in splits}


def _made(rows: Chosen, protocol: Protocol) -> int:
    return len(rows) * len(rows.captions[0]) * len(protocol.seeds)


def load_judges(
    protocol: Protocol,
    device: torch.device | str | None = None,
    sources: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> dict[str, FeatureNetwork]:
    """The networks that a protocol names, but the model's own.

    `sources` and `without` go by the network's first word: `inception`, `clip`. Raises UserError when one cannot be had.
    """
    names = dict.fromkeys(network for _, network in protocol.wanted if network not in ("", "own"))
    sources = sources or {}
    return {
        name: load_features(name, device, sources.get(name.partition("-")[0]))
        for name in names
        if name.partition("-")[0] not in without
    }


def captions_hash(chosen: Mapping[str, Chosen]) -> str:
    """Hash of the list of captions, as `rules.captions_text` writes it."""
    return captions_sha256({split: rows.rows() for split, rows in chosen.items()})


# ---- what the numbers depend on --------------------------------------------------------------------------------------


def manifest(model: TextToImage, data: ShardSet, protocol: Any, judges: Mapping[str, FeatureNetwork]) -> dict[str, Any]:
    """Hashes and versions that two scores by a protocol (a dataclass of rules) share, or by which they differ; see
    comparing.py."""
    from dist_t2i.utils import environment

    about = environment.describe()
    return {
        "weights_sha256": model.files.sha256(),
        "images_seen": model.images_seen,
        "image_size": model.image_size,
        "data_fingerprint": data.fingerprint,
        "protocol_sha256": rules_sha256(protocol),
        "judges": {
            name: {"name": judge.name, "weights_sha256": judge.weights_sha256, "side": judge.side}
            for name, judge in judges.items()
        },
        "packages": about["packages"],
        "code": {**about["code"], "sha256": code_sha256()},
        "device": str(model.device),
    }


def code_sha256() -> str:
    """Hash of this package's source files: there is not always a git revision to name."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        digest.update(f"{path.relative_to(root).as_posix()} {len(data := path.read_bytes())}\n".encode())
        digest.update(data)
    return digest.hexdigest()
