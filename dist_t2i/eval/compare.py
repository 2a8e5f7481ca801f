"""Two files of scores side by side, or why they cannot be compared: which key of their manifests differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Found = Mapping[str, Any]
"""A file of scores, as `scores.read_scores` gives it."""

_SAME = {
    "protocol_sha256": "the rules",
    "captions_sha256": "the captions",
    "reference_sha256": "the real pictures, as they were judged",
    "image_size": "the size of the pictures",
}
"""Keys of a manifest that must agree for any two numbers to be compared."""
_TOLD = {
    "truncation": "the models' truncation",
    "color_sharpness": "the sharpness of the models' palettes",
    "data_fingerprint": "the sets (their pictures here are the same)",
    "device": "the device",
}
"""Keys whose difference is worth a word. Weights and images seen are what one compares."""


def differences(a: Found, b: Found) -> list[str]:
    """Why no number of `a` may be compared with one of `b`, a line a key; empty when they may."""
    lines = []
    names = [f"{s['protocol']['name']} version {s['protocol']['version']}" for s in (a, b)]
    if names[0] != names[1]:
        return [f"protocol: {names[0]} and {names[1]}"]
    for key, what in _SAME.items():
        values = [s["manifest"].get(key) for s in (a, b)]
        if key == "protocol_sha256" and values[0] != values[1]:
            rules = [key for key in a["protocol"] if a["protocol"][key] != b["protocol"].get(key)]
            lines.append(f"{key}: {what} of {names[0]} differ ({', '.join(rules) or 'in what they list'})")
        elif isinstance(values[0], dict) and isinstance(values[1], dict):
            shared = values[0].keys() & values[1].keys()
            lines += [
                f"{key}: {what} of {split} differ" for split in sorted(shared) if values[0][split] != values[1][split]
            ]
        elif values[0] != values[1]:
            lines.append(f"{key}: {what} differ ({_short(values[0])} and {_short(values[1])})")
    return lines


def remarks(a: Found, b: Found) -> list[str]:
    """What else differs and is no reason not to compare, a line each."""
    lines = []
    for key, what in _TOLD.items():
        values = [s["manifest"].get(key) for s in (a, b)]
        if values[0] != values[1]:
            lines.append(f"{key}: {what} differ ({_short(values[0])} and {_short(values[1])})")
    codes = [s["manifest"].get("code", {}).get("sha256") for s in (a, b)]
    if codes[0] != codes[1]:
        lines.append(f"code: the two were made by different code ({_short(codes[0])} and {_short(codes[1])})")
    return lines


def pairs(a: Found, b: Found) -> Iterator[tuple[str, str, Found | None, Found | None, str]]:
    """(split, name, score of a, score of b, why this one may not be compared) for every score that either has."""
    for split in dict.fromkeys([*a["splits"], *b["splits"]]):
        mine, yours = ({score["key"]: score for score in s["splits"].get(split, {}).get("scores", [])} for s in (a, b))
        for key in dict.fromkeys([*mine, *yours]):
            one, other = mine.get(key), yours.get(key)
            name = (
                (one or other or {})["name"].partition(" (")[0] if key == "tone_order" else (one or other or {})["name"]
            )
            yield split, name, one, other, _objection(a, b, one, other)


def _objection(a: Found, b: Found, one: Found | None, other: Found | None) -> str:
    if one is None or other is None:
        return f"only {'the second' if one is None else 'the first'} has it"
    network = one.get("network", "")
    if not network or network == "own":
        return ""  # every model's own opinion is by its own weights: said by its name
    judges = [s["manifest"]["judges"].get(network, {}) for s in (a, b)]
    if judges[0].get("weights_sha256") != judges[1].get("weights_sha256"):
        return "the judges' weights_sha256 differ: " + " and ".join(
            _short(judge.get("weights_sha256")) for judge in judges
        )
    return ""


def table(a: Found, b: Found, names: tuple[str, str]) -> str:
    """The comparison for a terminal: both numbers side by side with their intervals, or what stands against it."""
    found = differences(a, b)
    lines = [f"{name}: {s['manifest']['images_seen']:,} images seen" for name, s in zip(names, (a, b), strict=True)]
    if found:
        return "\n".join([*lines, "not comparable:", *(f"  {line}" for line in found)])
    shown = ""
    for split, name, one, other, objection in pairs(a, b):
        if split != shown:
            lines.append(f"{split}:")
            shown = split
        values = "   ".join(f"{_value(score):<26}" for score in (one, other))
        apart = "" if objection or _overlap(one, other) else "   apart: the intervals do not overlap"
        lines.append(f"  {name}")
        lines.append(f"      {values}".rstrip() + (f"   not comparable: {objection}" if objection else apart))
    return "\n".join([*lines, *(f"note: {line}" for line in remarks(a, b))])


def _value(score: Found | None) -> str:
    return "-" if score is None else f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})"


def _overlap(one: Found | None, other: Found | None) -> bool:
    return one is None or other is None or (one["low"] <= other["high"] and other["low"] <= one["high"])


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
