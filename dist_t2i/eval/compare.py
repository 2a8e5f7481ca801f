"""Compares two files of scores, or lists the keys of the manifests that make the scores incomparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ScoresJson = Mapping[str, Any]
"""A scores.json as `scores.read_scores` returns it, or one score of a scores.json."""
_REQUIRED = {
    "protocol_sha256": "the rules",
    "captions_sha256": "the captions",
    "reference_sha256": "the real pictures",
    "image_size": "the size of the pictures",
}
"""Two scores are comparable only if their manifests agree in these keys."""
_NOTED = {
    "truncation": "the models' truncation",
    "color_sharpness": "the sharpness of the models' palettes",
    "data_fingerprint": "the sets (their pictures here are the same)",
    "device": "the device",
}
"""A difference in these keys is printed as a note but does not prevent a comparison. The weights and the number of
images seen may differ, because the purpose is to compare different models."""


def differences(a: ScoresJson, b: ScoresJson) -> list[str]:
    """The reasons why the scores of `a` and `b` must not be compared, one line per key; empty for comparable scores."""
    names = [f"{s['protocol']['name']} version {s['protocol']['version']}" for s in (a, b)]
    if names[0] != names[1]:
        return [f"protocol: {names[0]} and {names[1]}"]
    lines = []
    for key, what in _REQUIRED.items():
        first, second = (s["manifest"].get(key) for s in (a, b))
        if key == "protocol_sha256" and first != second:
            rules = [key for key in a["protocol"] if a["protocol"][key] != b["protocol"].get(key)]
            lines.append(f"{key}: {what} of {names[0]} differ ({', '.join(rules) or 'in what they list'})")
        elif isinstance(first, dict) and isinstance(second, dict):
            splits = sorted(split for split in first.keys() & second.keys() if first[split] != second[split])
            lines += [f"{key}: {what} of {split} differ" for split in splits]
        elif first != second:
            lines.append(f"{key}: {what} differ ({_short(first)} and {_short(second)})")
    return lines


def remarks(a: ScoresJson, b: ScoresJson) -> list[str]:
    """Differences that do not prevent a comparison, one line each."""
    values = {(key, f"{what} differ"): [s["manifest"].get(key) for s in (a, b)] for key, what in _NOTED.items()}
    values["code", "the versions of the code differ"] = [s["manifest"].get("code", {}).get("sha256") for s in (a, b)]
    return [
        f"{key}: {message} ({_short(first)} and {_short(second)})"
        for (key, message), (first, second) in values.items()
        if first != second
    ]


def pairs(a: ScoresJson, b: ScoresJson) -> Iterator[tuple[str, str, ScoresJson | None, ScoresJson | None, str]]:
    """Yields (split, name, score of a, score of b, reason against a comparison or "") for each score in either file."""
    for split in dict.fromkeys([*a["splits"], *b["splits"]]):
        by_key = [{score["key"]: score for score in s["splits"].get(split, {}).get("scores", [])} for s in (a, b)]
        for key in dict.fromkeys([*by_key[0], *by_key[1]]):
            first, second = (scores.get(key) for scores in by_key)
            name = (first or second or {})["name"]
            if key == "tone_order":  # this score's name contains a count, which differs between models
                name = name.partition(" (")[0]
            yield split, name, first, second, _objection(a, b, first, second)


def _objection(a: ScoresJson, b: ScoresJson, first: ScoresJson | None, second: ScoresJson | None) -> str:
    if first is None or second is None:
        return f"only {'the second' if first is None else 'the first'} has it"
    network = first.get("network", "")
    if not network or network == "own":
        return ""  # own networks always differ between models, and the name of the score says so
    hashes = [s["manifest"]["judges"].get(network, {}).get("weights_sha256") for s in (a, b)]
    differ = f"the feature networks' weights_sha256 differ: {_short(hashes[0])} and {_short(hashes[1])}"
    return differ if hashes[0] != hashes[1] else ""


def table(a: ScoresJson, b: ScoresJson, names: tuple[str, str]) -> str:
    """The comparison as text for a terminal: both values with their intervals, or the reasons against a comparison."""
    lines = [f"{name}: {s['manifest']['images_seen']:,} images seen" for name, s in zip(names, (a, b), strict=True)]
    if reasons := differences(a, b):
        return "\n".join([*lines, "not comparable:", *(f"  {reason}" for reason in reasons)])
    for split, name, first, second, objection in pairs(a, b):
        if f"{split}:" not in lines:
            lines.append(f"{split}:")
        verdict = f"   not comparable: {objection}" if objection else ""
        if first and second and not objection and (first["low"] > second["high"] or second["low"] > first["high"]):
            verdict = "   the intervals do not overlap"
        lines += [f"  {name}", f"      {_value(first):<26}   {_value(second):<26}".rstrip() + verdict]
    return "\n".join([*lines, *(f"note: {line}" for line in remarks(a, b))])


def _value(score: ScoresJson | None) -> str:
    return "-" if score is None else f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
