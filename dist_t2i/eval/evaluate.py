"""Scores a model on a set by a protocol, with a manifest of everything that the scores depend on.

`selection.py` finds the pictures and captions, `measure.py` generates pictures and computes features, `scoring.py`
computes the scores. The result does not depend on the number of processes (ranks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.eval.judges.features import FeatureNetwork, load_features, own_network
from dist_t2i.eval.measure import Measured, measure
from dist_t2i.eval.protocol import Protocol, captions_sha256, load_protocol, rules_sha256
from dist_t2i.eval.ranks import ALONE, Ranks
from dist_t2i.eval.scores import Scores, SplitScores
from dist_t2i.eval.scoring import scores_of
from dist_t2i.eval.selection import Selection, has_listed, has_styles, select, splits_of
from dist_t2i.utils import environment
from dist_t2i.utils.files import sha256_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage


def protocol_for(data: ShardSet) -> Protocol:
    """The default protocol of a set.

    A set named scenes with enough held-out pictures gets `scenes`. A set with all pictures that `openmoji` lists gets
    `openmoji-styles` if these pictures have two styles, otherwise `openmoji`. Other sets get `held-out`.
    """
    scenes, listed = load_protocol("scenes"), load_protocol("openmoji")
    split = scenes.splits[0]
    if data.manifest.get("name") == "scenes" and split in data.splits:
        if len(data.samples(split)) >= scenes.min_pictures:
            return scenes
    elif has_listed(data, listed):
        return load_protocol("openmoji-styles") if has_styles(data.samples(listed.splits[0])[0].attributes) else listed
    return load_protocol("held-out")


def evaluate(
    model: TextToImage,
    data: ShardSet,
    protocol: Protocol,
    *,
    say: Callable[[str], None] = print,
    networks: Mapping[str, FeatureNetwork] | None = None,
    ranks: Ranks = ALONE,
    selections: Mapping[str, Selection] | None = None,
    cache: Mapping[str, dict[str, Tensor]] | None = None,
    measured: dict[str, Measured] | None = None,
) -> Scores:
    """Scores a model on the held-out splits of a set. Collective: all ranks call this function and get the scores.

    `networks` and `selections` default to the results of `load_networks` and `select_all`. Metrics whose network is not
    in `networks` are left out and listed in the manifest. `cache` maps each split to a dictionary, empty at first,
    which keeps the features of the real pictures for the next call. `measured` receives the features of each split on
    rank 0. Raises UserError if the set lacks splits, pictures or captions that the protocol needs. On one core at 32
    px, an evaluation takes about 0.1 s per picture and seed; the feature network takes nearly all of this time.
    """
    selections = selections or select_all(data, protocol, ranks)
    networks = dict(networks if networks is not None else load_networks(protocol, model.device, size=model.image_size))
    wanted = {key for _, key in protocol.wanted}
    if "own" in wanted:
        networks.setdefault("own", own_network(model))
    used = {key: network for key, network in networks.items() if key in wanted}
    parts = {}
    for split, rows in selections.items():
        if ranks.main:
            count = len(rows) * len(rows.captions[0]) * len(protocol.seeds)
            names = ", ".join(network.name for network in used.values())
            say(f"{split}: {len(rows)} real pictures; generating {count:,} (captions x seeds); features: {names}")
        if (part := measure(model, rows, protocol, used, ranks, cache[split] if cache else None)) is not None:
            parts[split] = part
    if measured is not None:
        measured.update(parts)

    def scores() -> Scores:
        say("all features are computed; computing the metrics and their intervals")
        splits = {key: SplitScores(len(part.captions), scores_of(part, protocol, used)) for key, part in parts.items()}
        generator = model.config.model.generator
        about = manifest(model, data, protocol, used) | {
            "truncation": generator.truncation if protocol.truncation is None else protocol.truncation,
            "color_sharpness": generator.color_sharpness,
            "captions_sha256": captions_hash(selections),
            "reference_sha256": {split: part.reference_sha256 for split, part in parts.items()},
            "left_out": [f"{metric}/{key}" for metric, key in protocol.wanted if key not in {"", *used}],
        }
        return Scores(dataclasses.asdict(protocol), about, splits)

    return ranks.from_main(scores)


def select_all(data: ShardSet, protocol: Protocol, ranks: Ranks = ALONE) -> dict[str, Selection]:
    """Selects the pictures and captions of each split. Collective. Raises UserError."""
    splits = ranks.all(lambda: splits_of(data, protocol))
    return {split: select(data, split, protocol, ranks) for split in splits}


def load_networks(
    protocol: Protocol,
    device: torch.device | str | None = None,
    weights: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    size: int = 32,
) -> dict[str, FeatureNetwork]:
    """Loads the feature networks that a protocol names, except the model's own. Raises UserError.

    `weights` maps a network to the path or URL of its weights, and `without` lists networks to leave out. A network's
    name in `weights` and `without` is the first word of its key, such as `inception` or `clip`. `size` is the side of
    the model's pictures in pixels, for networks that are trained on pictures of this size.
    """
    keys = {key: key.partition("-")[0] for _, key in protocol.wanted if key not in ("", "own")}
    weights = weights or {}
    wanted = {key: word for key, word in keys.items() if word not in without}
    return {key: load_features(key, device, weights.get(word), size) for key, word in wanted.items()}


def captions_hash(selections: Mapping[str, Selection]) -> str:
    """SHA-256 of the list of captions in the form that `protocol.captions_text` writes."""
    return captions_sha256({split: rows.rows() for split, rows in selections.items()})


def manifest(
    model: TextToImage, data: ShardSet, protocol: Any, networks: Mapping[str, FeatureNetwork]
) -> dict[str, Any]:
    """The hashes and versions on which scores depend, for `compare.py`. `protocol` is any dataclass of rules."""
    about, attributes = environment.describe(), ("name", "weights_sha256", "side")
    code = [(name, path.read_bytes()) for name, path in code_files().items()]
    pieces = (piece for name, content in code for piece in (f"{name} {len(content)}\n".encode(), content))
    return {
        "weights_sha256": model.files.sha256(),
        "images_seen": model.images_seen,
        "image_size": model.image_size,
        "data_fingerprint": data.fingerprint,
        "protocol_sha256": rules_sha256(protocol),
        "judges": {key: {name: getattr(network, name) for name in attributes} for key, network in networks.items()},
        "packages": about["packages"],
        "code": {**about["code"], "sha256": sha256_of(pieces)},  # identifies code without a git revision
        "device": str(model.device),
    }


def code_files() -> dict[str, Path]:
    """Path inside dist_t2i -> file of every module, in sorted order."""
    root = Path(__file__).resolve().parents[1]
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")))
