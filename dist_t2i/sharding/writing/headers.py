"""Reads the width and height of a picture from its header and checks its last bytes, without decoding any pixel.

The check is fast and strict: only an ordinary, complete JPEG, PNG or WebP is measured, and the caller must decode any
other picture. The check detects truncated files, but not a changed byte in the middle of a file.

Sources: ITU-T T.81 annex B (JPEG), the PNG specification sections 5 and 11, RFC 9649 (WebP).
"""

from __future__ import annotations

import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_FRAMES = (0xC0, 0xC1, 0xC2)
"""The frame markers of baseline, extended and progressive JPEGs with Huffman coding, which every decoder reads."""
_BEFORE_FRAME = frozenset({*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD})
"""The markers of segments that may precede the frame: application data, comments and tables."""


def kind_of(data: bytes) -> str:
    """The format according to the first bytes: `jpg`, `png` or `webp`, or "" for any other data."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == _PNG:
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def measure(data: bytes) -> tuple[int, int] | None:
    """The stored (width, height) of a picture whose file looks complete; None if the caller must decode the picture."""
    measure_kind = {"jpg": _jpeg, "png": _png, "webp": _webp}.get(kind_of(data))
    return measure_kind(data) if measure_kind else None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    if data[-2:] != b"\xff\xd9":
        return None
    at, size = 2, len(data)
    while at + 10 <= size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            if data[at + 4] != 8 or data[at + 9] not in (1, 3) or data.find(b"\xff\xda", at) < 0:
                return None
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return (width, height) if width and height else None
        if marker not in _BEFORE_FRAME:
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _png(data: bytes) -> tuple[int, int] | None:
    if data[8:16] != b"\0\0\0\rIHDR" or data[-12:] != _PNG_END:
        return None
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _webp(data: bytes) -> tuple[int, int] | None:
    if int.from_bytes(data[4:8], "little") + 8 != len(data):
        return None
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    if data[12:16] == b"VP8L" and data[20:21] == b"\x2f":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None  # VP8X, the format with transparency, animation or metadata, must be decoded
