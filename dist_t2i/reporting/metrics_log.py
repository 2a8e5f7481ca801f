"""metrics.jsonl: one report per line, as a JSON object; `images` increases from line to line."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_t2i.utils.files import write_atomic


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line with one write. Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity"."""
    entry = {key: json.dumps(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; skips a last line that a crash has truncated. Empty if the file does not exist."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "images" in entry]


def cut(path: Path, images: int) -> int:
    """Drop the lines beyond `images`, the position where a run resumes; returns the number of dropped lines."""
    entries = read(path)
    kept = [entry for entry in entries if entry["images"] <= images]
    if path.exists():
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return len(entries) - len(kept)
