"""Skin tones in captions, by Unicode's names: "man vampire medium-dark skin tone".

The module that prepares OpenMoji has its own pattern, which also matches names with two tones. The two modules do not
import each other.
"""

from __future__ import annotations

import re

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""Unicode's Fitzpatrick tones, lightest first."""
_TONE = re.compile(rf"(?<![\w-])({'|'.join(TONES)}) skin tone")


def split_tone(caption: str) -> tuple[str, str, str] | None:
    """Splits "man vampire medium-dark skin tone" into ("man vampire ", "medium-dark", "").

    Returns None unless the caption names exactly one tone.
    """
    tones = _TONE.findall(caption)
    if len(tones) != 1 or caption.count("skin tone") != 1:
        return None
    before, after = caption.split(f"{tones[0]} skin tone")
    return before, tones[0], after


def tone_of(caption: str) -> str:
    """The skin tone of a caption that names exactly one tone, else ""."""
    parts = split_tone(caption)
    return parts[1] if parts else ""


def tone_pair(caption: str) -> tuple[str, str] | None:
    """The caption with its tone replaced by light and by dark; None unless it names exactly one tone."""
    parts = split_tone(caption)
    return (f"{parts[0]}light skin tone{parts[2]}", f"{parts[0]}dark skin tone{parts[2]}") if parts else None


def group_of(caption: str) -> str:
    """A name that is equal for captions that differ only in skin tone. They get the same noise and one resample."""
    pair = tone_pair(caption)
    return pair[0] if pair else caption
