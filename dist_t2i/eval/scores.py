"""Scores as data: a number with its interval, its floor and its ceiling, and the manifest that makes it comparable."""

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
    """One number about one split."""

    key: str
    """Machine name, such as `kid` or `recall_at_1`."""
    name: str
    """What it is called, with its judge: "KID (EfficientNet-Lite0)"."""
    value: float
    low: float
    """95% bootstrap interval over captions (groups of captions that belong together are drawn together) ..."""
    high: float
    """... of the same model and noise: it says nothing about other training seeds."""
    better: str
    """`higher` or `lower`."""
    floor: Mapping[str, float] = field(default_factory=dict)
    """What the low end of the scale looks like: description -> value."""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    """What the high end of the scale looks like."""
    network: str = ""
    """The judge, by its key in the manifest's `judges`; "" where none was asked."""


@dataclass(frozen=True)
class SplitScores:
    """The scores on one split."""

    pictures: int
    """Real pictures, one caption each."""
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    protocol: Mapping[str, Any]
    manifest: Mapping[str, Any]
    """Hashes of weights, data, captions, judges and code, versions: all that the numbers depend on."""
    splits: Mapping[str, SplitScores]

    def __getitem__(self, place: tuple[str, str]) -> Score:
        """scores["test-combinations", "kid"]. Raises KeyError."""
        split, key = place
        return next((score for score in self.splits[split].scores if score.key == key), None) or _missing(key)

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Writes scores.json atomically."""
        write_atomic(path, json.dumps(self.as_json(), indent=1) + "\n")


def read_scores(path: Path) -> dict[str, Any]:
    """A file that `Scores.save` wrote. Raises UserError when it cannot be read, or an older version wrote it."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        version = scores["format"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); tools/evaluate.py writes such files") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not scores that tools/evaluate.py wrote") from None
    if version != FORMAT:
        raise UserError(f"{path}: scores of format {version}, but this version reads format {FORMAT}; evaluate again")
    manifest = scores.get("manifest", {})
    if "colour_sharpness" in manifest:  # the key's name in earlier versions
        manifest["color_sharpness"] = manifest.pop("colour_sharpness")
    return scores


def _missing(key: str) -> Score:
    raise KeyError(key)


def rows(scores: Mapping[str, Any]) -> Iterator[tuple[str, int, list[str]]]:
    """(split, pictures, [name, value and interval, better, floor, ceiling]) of each score in a scores.json."""
    for split, found in scores["splits"].items():
        for score in found["scores"]:
            value = f"{_number(score['value'])} ({_number(score['low'])} to {_number(score['high'])})"
            ends = ["; ".join(f"{_number(v)} {what}" for what, v in score[end].items()) for end in ("floor", "ceiling")]
            yield split, found["pictures"], [score["name"], value, score["better"], *ends]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def table(scores: Mapping[str, Any]) -> str:
    """A scores.json for a terminal: every number with floor and ceiling beneath it."""
    lines: list[str] = []
    shown = ""
    for split, pictures, (name, value, better, floor, ceiling) in rows(scores):
        if split != shown:
            lines.append(f"{split}: {pictures:,} held-out pictures" + ("" if lines else ", 95% intervals in brackets"))
            shown = split
        lines.append(f"  {name:<34} {value}   {better} is better")
        lines.append(f"      floor    {floor}")
        lines.append(f"      ceiling  {ceiling}")
    return "\n".join(lines)


def markdown(scores: Mapping[str, Any]) -> str:
    """A scores.json as Markdown tables."""
    lines: list[str] = []
    shown = ""
    for split, pictures, cells in rows(scores):
        if split != shown:
            lines += ["", f"On `{split}` ({pictures:,} held-out pictures; 95% intervals over captions):", ""]
            lines += ["| score | this model | better | floor | ceiling |", "|---|---|---|---|---|"]
            shown = split
        lines.append("| " + " | ".join(cells) + " |")
    about, judges = scores["protocol"], scores["manifest"]["judges"]
    named = "; ".join(judge["name"] for judge in judges.values())
    lines += ["", f"Protocol `{about['name']}` version {about['version']}; judges: {named}."]
    return "\n".join(lines).lstrip("\n")
