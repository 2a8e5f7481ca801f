"""Scores as data: each value with interval, floor and ceiling, and a manifest that shows which are comparable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_t2i.errors import UserError
from dist_t2i.utils.files import write_atomic

FORMAT = 2


@dataclass(frozen=True)
class Score:
    """One score of a model on one split."""

    key: str
    """Machine name, such as `kid` or `recall_at_1`."""
    name: str
    """Printed name with its feature network: "KID (EfficientNet-Lite0)"."""
    value: float
    low: float
    """Lower end of the 95% bootstrap interval over captions; groups of related captions are resampled together."""
    high: float
    """Upper end of the interval. The interval is for this model and this noise; models from other seeds may differ
    more."""
    better: str
    """`higher` or `lower`."""
    floor: Mapping[str, float] = field(default_factory=dict)
    """Reference values at the low end of the scale (for a distance, the good end): description -> value."""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    network: str = ""
    """Key of the feature network in the manifest's `judges`; "" for a metric without a feature network."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Values that make up or explain this one: description -> value."""


@dataclass(frozen=True)
class SplitScores:
    """The scores on one split, and its number of real pictures."""

    pictures: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation. `manifest` has hashes and versions of everything on which the scores depend."""

    protocol: Mapping[str, Any]
    manifest: Mapping[str, Any]
    splits: Mapping[str, SplitScores]

    def __getitem__(self, split_and_key: tuple[str, str]) -> Score:
        """scores["test-combinations", "kid"]. Raises KeyError."""
        return {score.key: score for score in self.splits[split_and_key[0]].scores}[split_and_key[1]]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Writes scores.json atomically."""
        write_atomic(path, json.dumps(self.as_json(), indent=1) + "\n")


def read_scores(path: Path) -> dict[str, Any]:
    """Reads a file that `Scores.save` wrote. Raises UserError when the file is unreadable or has another format."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        version = scores["format"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); tools/evaluate.py writes such files") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not contain scores that tools/evaluate.py wrote") from None
    if version != FORMAT:
        raise UserError(f"{path}: scores of format {version}, but this version reads format {FORMAT}; evaluate again")
    manifest = scores.get("manifest", {})
    if "colour_sharpness" in manifest:  # the key's name in earlier versions
        manifest["color_sharpness"] = manifest.pop("colour_sharpness")
    return scores


def known_scores(folder: Path, weights: str) -> dict[str, Any] | None:
    """The content of a folder's scores.json; None if its scores are for weights with another SHA-256."""
    try:
        scores = read_scores(folder / "scores.json")
    except UserError:
        return None
    return scores if scores["manifest"]["weights_sha256"] == weights else None


def rows(scores: Mapping[str, Any]) -> Iterator[tuple[str, int, list[list[str]]]]:
    """Yields (split, pictures, rows) of a scores.json; a row is [name, value and interval, better, floor, ceiling]."""

    def number(value: float) -> str:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    for split, part in scores["splits"].items():
        cells = []
        for score in part["scores"]:
            value = f"{number(score['value'])} ({number(score['low'])} to {number(score['high'])})"
            ends = ["; ".join(f"{number(v)} {what}" for what, v in score[end].items()) for end in ("floor", "ceiling")]
            parts = "; ".join(f"{number(v)} {what}" for what, v in score.get("parts", {}).items())
            cells.append([f"{score['name']} ({parts})" if parts else score["name"], value, score["better"], *ends])
        yield split, part["pictures"], cells


def table(scores: Mapping[str, Any]) -> str:
    """A scores.json as text for a terminal: each score, and below it the score's floor and ceiling."""
    lines: list[str] = []
    for split, pictures, cells in rows(scores):
        lines.append(f"{split}: {pictures:,} held-out pictures" + ("" if lines else ", 95% intervals in brackets"))
        for name, value, better, floor, ceiling in cells:
            lines.append(f"  {name:<34} {value}   {better} is better")
            lines += [f"      floor    {floor}", f"      ceiling  {ceiling}"]
    return "\n".join(lines)


def markdown(scores: Mapping[str, Any]) -> str:
    """A scores.json as Markdown tables."""
    lines: list[str] = []
    for split, pictures, cells in rows(scores):
        lines += [f"On `{split}` ({pictures:,} held-out pictures; 95% intervals over captions):", ""]
        lines += ["| score | this model | better | floor | ceiling |", "|---|---|---|---|---|"]
        lines += [*("| " + " | ".join(row) + " |" for row in cells), ""]
    about, networks = scores["protocol"], scores["manifest"]["judges"]
    names = "; ".join(network["name"] for network in networks.values())
    return "\n".join([*lines, f"Protocol `{about['name']}` version {about['version']}; feature networks: {names}."])
