"""Protocols as files: every rule of an evaluation written out, frozen under a name and a version.

    dist_t2i/eval/protocols/
      openmoji.yaml       one protocol; every key is given, none has a default there
      openmoji.txt        its captions, where they can be listed: `split <tab> key <tab> caption` a line
      frozen.json         "NAME VERSION" -> SHA-256 of the rules, the hash of the list among them

Rules that change need another version: a file that does not have the hash its name and version were frozen with is
refused. A protocol of one's own is a file anywhere; its hash goes with every score all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_t2i.config.fields import expected, field_types
from dist_t2i.config.files import convert
from dist_t2i.errors import UserError

FOLDER = Path(__file__).with_name("protocols")
FROZEN = FOLDER / "frozen.json"
METRICS = (
    "kid", "retrieval", "tone-order", "fid", "inception-score", "precision-recall", "clip-score", "r-precision",
)  # fmt: skip
NETWORKS = ("efficientnet-lite0", "inception-clean", "inception-legacy", "clip", "own")
_ONLY = {
    "inception-score": ("inception-clean", "inception-legacy"),
    "clip-score": ("clip", "own"),
    "r-precision": ("clip", "own"),
    "tone-order": ("",),
}
"""Metrics that not every network can judge: those that need classes, or texts, or none at all."""


@dataclass(frozen=True)
class Protocol:
    """The rules of an evaluation."""

    name: str
    version: int = 1
    splits: tuple[str, ...] = ()
    """Whose pictures are the reference and whose captions are drawn; empty: every split whose name begins with `test`."""
    captions: Literal["first", "hash", "listed"] = "first"
    """Which pictures and captions: `first`: the first `max_pictures` in the set's order, and each one's first captions;
    `hash`: the pictures with the smallest hash of (protocol, key), and of each a caption that this hash picks;
    `listed`: those of the committed list beside the protocol."""
    captions_per_picture: int = 1
    """So many pictures are made for each picture's first captions, one each, round and round where it has fewer."""
    captions_sha256: str = ""
    """Hash of the list of captions; empty where it depends on the set: it is then kept with the run's scores."""
    min_pictures: int = 4
    """A split with fewer is refused."""
    max_pictures: int = 2_000
    """At most so many of a split."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """One picture per caption and seed. KID is taken within each seed and averaged, as are the others."""
    ema: bool = True
    """Whether the generator's moving average makes the pictures, or its weights as they are."""
    truncation: float | None = None
    """Factor on the noise; None: the configuration's."""
    crop: Literal["centre"] = "centre"
    """Of real pictures: the largest square in the middle ..."""
    resize: Literal["bilinear-antialias"] = "bilinear-antialias"
    """... brought to the size of the model's pictures. How judges resize is part of their names."""
    metrics: tuple[str, ...] = ("kid/efficientnet-lite0", "retrieval/efficientnet-lite0", "tone-order")
    """METRIC/NETWORK each: the metrics are those of `METRICS`, the networks those of `NETWORKS`."""
    gallery: int = 100
    """Pictures (retrieval) or captions (R-precision) among which the true one is looked for."""
    neighbours: int = 3
    """k of precision and recall (Kynkaanniemi et al. 2019, sec. 3)."""
    kid_subsets: int = 100
    """KID by Inception is the mean over so many subsets (Binkowski et al. 2018) ..."""
    kid_subset_size: int = 1_000
    """... of so many pictures, or of all where there are fewer."""
    inception_splits: int = 10
    """Parts over which the Inception Score is averaged (Salimans et al. 2016)."""
    resamples: int = 1_000
    """Bootstrap resamples for the intervals."""
    costly_resamples: int = 20
    """The same for the Frechet distance, whose resamples take seconds each."""

    @property
    def sha256(self) -> str:
        """Hash of all rules, the list's hash among them."""
        return rules_sha256(self)

    @property
    def wanted(self) -> tuple[tuple[str, str], ...]:
        """(metric, network) in order; the network is "" for tone-order, which needs none."""
        return tuple((metric, network) for metric, _, network in (entry.partition("/") for entry in self.metrics))

    def listed(self) -> dict[str, list[tuple[str, str]]]:
        """Split -> (key, caption) of the committed list. Raises UserError when it is not the one that was frozen."""
        path = FOLDER / f"{self.name}.txt"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: the captions of protocol {self.name} cannot be read ({error.strerror})") from None
        found: dict[str, list[tuple[str, str]]] = {}
        for line in text.splitlines():
            split, key, caption = line.split("\t")
            found.setdefault(split, []).append((key, caption))
        if captions_sha256(found) != self.captions_sha256:
            raise UserError(
                f"{path}: these are not the captions of {self.name} version {self.version} (their hash differs); "
                "put the file back, or give the protocol another version"
            )
        return found


def rules_sha256(rules: Any) -> str:
    """Hash of all fields of a dataclass of rules."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(rules), sort_keys=True).encode()).hexdigest()


def captions_sha256(captions: Mapping[str, typing.Iterable[tuple[str, str]]]) -> str:
    """Hash of a list of captions: split -> (key, caption). What `captions_text` writes has this SHA-256."""
    return hashlib.sha256(captions_text(captions).encode()).hexdigest()


def captions_text(captions: Mapping[str, typing.Iterable[tuple[str, str]]]) -> str:
    """A list of captions as a file: `split <tab> key <tab> caption` a line, blanks of a caption as single spaces."""
    lines = [
        f"{split}\t{key}\t{' '.join(caption.split())}\n" for split, rows in captions.items() for key, caption in rows
    ]
    return "".join(lines)


def known_protocols() -> list[str]:
    """Names of the protocols that the package holds."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str | Path) -> Protocol:
    """The protocol of that name, or in that .yaml file.

    Raises UserError for an unknown name, a file that is none, and rules that were changed under their old version.
    """
    path = Path(name)
    packaged = path.suffix not in (".yaml", ".yml")
    if packaged:
        path = FOLDER / f"{name}.yaml"
        if str(name) not in known_protocols():
            known = ", ".join(known_protocols())
            raise UserError(f"no protocol {str(name)!r}; there are {known}, or name a .yaml file of your own")
    protocol = _read(path)
    frozen = json.loads(FROZEN.read_text(encoding="utf-8")).get(f"{protocol.name} {protocol.version}")
    if frozen != protocol.sha256 and (frozen or packaged):
        what = "is not the one that was frozen: its rules were changed" if frozen else "was never frozen"
        raise UserError(
            f"{path}: protocol {protocol.name} version {protocol.version} {what}. Scores under one version must stay "
            f"comparable: put the rules back, or give them another version (hash of these rules: {protocol.sha256})"
        )
    return protocol


def _read(path: Path) -> Protocol:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a protocol is a list of `key: value` lines")
    types = field_types(Protocol)
    problems = [f"{key}: unknown" for key in content if key not in types]
    problems += [f"{key}: missing (a protocol gives every key)" for key in types if key not in content]
    values: dict[str, Any] = {}
    for key in types.keys() & content.keys():
        try:
            values[key] = convert(content[key], types[key])
        except ValueError as error:
            problems.append(f"{key}: expected {expected(types[key])}, got {error}")
    if not problems:
        problems = list(_wrong(Protocol(**values)))
    if problems:
        raise UserError(f"{path}: not a protocol: {'; '.join(sorted(problems))}")
    return Protocol(**values)


def _wrong(protocol: Protocol) -> typing.Iterator[str]:
    for entry, (metric, network) in zip(protocol.metrics, protocol.wanted, strict=True):
        if metric not in METRICS:
            yield f"metrics: no metric {metric!r} (in {entry!r}); there are {', '.join(METRICS)}"
        elif network not in _ONLY.get(metric, NETWORKS):
            yield f"metrics: {entry!r}: {metric} goes with {' or '.join(_ONLY.get(metric, NETWORKS)) or 'no network'}"
    if not protocol.metrics:
        yield "metrics: names none"
    for key in ("captions_per_picture", "max_pictures", "resamples", "kid_subsets", "inception_splits", "neighbours"):
        if getattr(protocol, key) < 1:
            yield f"{key}: must be at least 1"
    for key in ("min_pictures", "gallery", "kid_subset_size", "costly_resamples"):
        if getattr(protocol, key) < 2:
            yield f"{key}: must be at least 2"
    if not protocol.seeds:
        yield "seeds: names none"
