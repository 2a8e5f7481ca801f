"""Protocols as files: all rules of an evaluation, frozen under a name and a version.

    dist_t2i/eval/protocols/
      openmoji.yaml       one protocol; the file sets every key, because no key has a default
      openmoji.txt        the captions of a protocol that lists them: `split <tab> key <tab> caption` per line
      frozen.json         "NAME VERSION" -> SHA-256 of the rules, including the hash of the list of captions

Changed rules need a new version: a protocol is refused if the hash of its rules differs from the hash that frozen.json
has for its name and version. Users may write their own protocols as files; scores record the hash of these rules, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_t2i.config.fields import field_types
from dist_t2i.config.files import read_section
from dist_t2i.errors import UserError

FOLDER = Path(__file__).with_name("protocols")
FROZEN = FOLDER / "frozen.json"
METRICS = tuple(
    "kid retrieval tone-order fid inception-score precision-recall clip-score r-precision diversity".split()
    + "attributes open-attributes styles".split()
)
FEATURES = ("efficientnet-lite0", "inception-clean", "inception-legacy", "clip", "own")
NETWORKS = (*FEATURES, "scenes", "styles")
_ONLY = {
    "inception-score": ("inception-clean", "inception-legacy"),
    "clip-score": ("clip", "own"),
    "r-precision": ("clip", "own"),
    "tone-order": ("",),
    "attributes": ("scenes",),
    "open-attributes": ("scenes",),
    "styles": ("styles",),
}
"""Metric -> the only networks that the metric can use: networks with classes, networks that embed texts,
networks that find attributes, or none. The other metrics can use all of `FEATURES`."""
_LEAST = dict.fromkeys(
    ("captions_per_picture", "max_pictures", "resamples", "kid_subsets", "inception_splits", "neighbours"), 1
) | dict.fromkeys(("min_pictures", "gallery", "kid_subset_size", "costly_resamples"), 2)


@dataclass(frozen=True)
class Protocol:
    """The rules of an evaluation."""

    name: str = ""
    version: int = 1
    splits: tuple[str, ...] = ()
    """Splits that contain the real pictures and their captions; empty: every split whose name begins with `test`."""
    captions: Literal["first", "hash", "listed", "distinct"] = "first"
    """`first`: the first `max_pictures` pictures in the set's order, each with its first captions. `hash`: the pictures
    with the smallest hash of (protocol, key), each with one caption that a hash selects. `listed`: the pictures and
    captions that NAME.txt lists. `distinct`: the first pictures in the set's order, each with one caption, which a hash
    selects from those of its captions that no earlier picture has."""
    captions_per_picture: int = 1
    """Number of captions per real picture from which pictures are generated; a picture with fewer repeats them."""
    captions_sha256: str = ""
    """Hash of the list of captions. Empty if the list depends on the set; an evaluation then saves the list."""
    min_pictures: int = 4
    """A split with fewer pictures is refused."""
    max_pictures: int = 2_000
    """Maximum number of pictures per split."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """One picture is generated per caption and seed. KID and some other metrics are averaged over the seeds."""
    ema: bool = True
    """Whether the generator uses the moving average of its weights (true) or its current weights (false)."""
    truncation: float | None = None
    """Factor that scales the noise; None: the factor in the model's configuration."""
    crop: Literal["centre"] = "centre"
    """How real pictures are cropped: to the largest central square."""
    resize: Literal["bilinear-antialias"] = "bilinear-antialias"
    """How this square is resized to the model's size. The name of a feature network includes its own resizing."""
    metrics: tuple[str, ...] = ("kid/efficientnet-lite0", "retrieval/efficientnet-lite0", "tone-order")
    """Each entry is METRIC/NETWORK, from `METRICS` and `NETWORKS`, or only METRIC if the metric needs no network."""
    gallery: int = 100
    """Number of candidates, including the true one: pictures in retrieval, captions in R-precision."""
    neighbours: int = 3
    """k of precision and recall (Kynkaanniemi et al. 2019, sec. 3)."""
    kid_subsets: int = 100
    """Number of random subsets over which KID with Inception features is averaged (Binkowski et al. 2018)."""
    kid_subset_size: int = 1_000
    """Maximum number of pictures in each of these random subsets."""
    inception_splits: int = 10
    """Number of parts of the pictures over which the Inception Score is averaged (Salimans et al. 2016)."""
    resamples: int = 1_000
    """Number of bootstrap resamples for the intervals."""
    costly_resamples: int = 20
    """Number of bootstrap resamples if one resample takes seconds, as for the Frechet distance."""

    @property
    def sha256(self) -> str:
        """Hash of all rules, which include the hash of the list of captions."""
        return rules_sha256(self)

    @property
    def wanted(self) -> tuple[tuple[str, str], ...]:
        """(metric, network) in order. The network of tone-order is "", because this metric needs no network."""
        return tuple((metric, network) for metric, _, network in (entry.partition("/") for entry in self.metrics))

    def listed(self) -> dict[str, list[tuple[str, str]]]:
        """Split -> list of (key, caption) in NAME.txt. Raises UserError when their hash is not `captions_sha256`."""
        path = FOLDER / f"{self.name}.txt"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: the captions of protocol {self.name} cannot be read ({error.strerror})") from None
        captions: dict[str, list[tuple[str, str]]] = {}
        for line in text.splitlines():
            split, key, caption = line.split("\t")
            captions.setdefault(split, []).append((key, caption))
        if captions_sha256(captions) != self.captions_sha256:
            problem = f"the hash shows that these are not the captions of {self.name} version {self.version}"
            raise UserError(f"{path}: {problem}; restore the file, or give the protocol a new version")
        return captions


def rules_sha256(rules: Any) -> str:
    """Hash of all fields of a dataclass of rules."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(rules), sort_keys=True).encode()).hexdigest()


def captions_sha256(captions: Mapping[str, Iterable[tuple[str, str]]]) -> str:
    """Hash of a list of captions (split -> (key, caption)): the SHA-256 of what `captions_text` returns."""
    return hashlib.sha256(captions_text(captions).encode()).hexdigest()


def captions_text(captions: Mapping[str, Iterable[tuple[str, str]]]) -> str:
    """The text of a file with these captions: `split <tab> key <tab> caption` per line, with white space normalized."""
    rows = ((split, key, " ".join(caption.split())) for split, pairs in captions.items() for key, caption in pairs)
    return "".join("\t".join(row) + "\n" for row in rows)


def known_protocols() -> list[str]:
    """Names of the package's protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str | Path) -> Protocol:
    """Loads a protocol by name, or from a .yaml file. Raises UserError."""
    path, known = Path(name), known_protocols()
    packaged = path.suffix not in (".yaml", ".yml")
    if packaged:
        path = FOLDER / f"{name}.yaml"
        if str(name) not in known:
            raise UserError(f"no protocol {str(name)!r}; name one of {', '.join(known)}, or your own .yaml file")
    protocol = _read(path)
    frozen = json.loads(FROZEN.read_text(encoding="utf-8")).get(f"{protocol.name} {protocol.version}")
    if frozen != protocol.sha256 and (frozen or packaged):
        problem = "differs from the frozen protocol: its rules were changed" if frozen else "was never frozen"
        remedy = f"restore the rules, or freeze them under a new version in frozen.json (hash: {protocol.sha256})"
        about = f"{path}: protocol {protocol.name} version {protocol.version}"
        raise UserError(f"{about} {problem}. Scores of one version must stay comparable: {remedy}")
    return protocol


def _read(path: Path) -> Protocol:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    problems: list[str] = []
    protocol: Protocol = read_section(content, Protocol, "", problems, "a protocol")
    if isinstance(content, dict):
        given = {key for key, value in content.items() if value is not None or key == "truncation"}
        problems += [f"{key}: missing (a protocol sets every key)" for key in field_types(Protocol).keys() - given]
    if problems := problems or list(_problems(protocol)):
        raise UserError(f"{path}: not a protocol: {'; '.join(sorted(problems))}")
    return protocol


def _problems(protocol: Protocol) -> Iterator[str]:
    for entry, (metric, network) in zip(protocol.metrics, protocol.wanted, strict=True):
        if metric not in METRICS:
            yield f"metrics: unknown metric {metric!r} (in {entry!r}); known: {', '.join(METRICS)}"
        elif network not in _ONLY.get(metric, FEATURES):
            yield f"metrics: {entry!r}: {metric} needs {' or '.join(_ONLY.get(metric, FEATURES)) or 'no network'}"
    if len(protocol.seeds) < 2 and "diversity" in (metric for metric, _ in protocol.wanted):
        yield "seeds: diversity compares pictures of one caption, so it needs at least two seeds"
    for key in ("metrics", "seeds"):
        if not getattr(protocol, key):
            yield f"{key}: empty; name at least one"
    for key, least in _LEAST.items():
        if getattr(protocol, key) < least:
            yield f"{key}: must be at least {least}"
