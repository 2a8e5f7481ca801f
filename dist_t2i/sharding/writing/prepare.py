"""Prepares a picture for its shard: checks it, applies the filters, shrinks and re-encodes it if asked."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_t2i.data.images import PictureError, check_size, decode, open_picture
from dist_t2i.sharding.writing.headers import kind_of, measure

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Options:
    """How a set is written."""

    size: int = 0
    """Larger pictures are shrunk to this short side, in pixels; 0 keeps their bytes."""
    format: str = ""
    """Re-encode every picture as `jpg`, `webp` or `png`; "" re-encodes only shrunk pictures and other formats."""
    quality: int = 95
    """Of the JPEGs and WebPs that are encoded."""
    check: str = "header"
    """How a picture is checked: by its `header` and end, or by a `decode` of every pixel."""
    min_side: int = 0
    """Pictures with a shorter side, in pixels, are left out."""
    max_aspect: float = 0.0
    """Pictures whose long side exceeds this many times the short one are left out; 0 keeps all."""
    shard_samples: int = 10_000
    shard_mb: float = 512.0
    vocabulary: int = 4096
    processes: int = 1
    threads: int = 16
    """Parallel downloads in each process."""
    retry_failed: bool = False
    """Rewrite the shards in which a picture could not be read."""
    about: dict[str, Any] = field(default_factory=dict)
    """Entries of the manifest: name, licence, credit."""


def prepare(data: bytes, options: Options) -> tuple[str, bytes, tuple[int, int]]:
    """Extension, bytes and stored (width, height) of a picture. Raises PictureError.

    An intact JPEG, PNG or WebP that neither shrinks nor changes its format keeps its bytes. Any other picture is
    encoded as `options.format`, by default as a JPEG if it was one, and otherwise as a PNG.
    """
    kind = kind_of(data)
    shape = measure(data) if options.check == "header" else None
    picture: Image | None = None
    if shape is None:
        shape, picture = _decoded(data, kind, options)
    check_size(*shape)
    if min(shape) < options.min_side:
        raise PictureError(f"smaller than --min-side {options.min_side}")
    if options.max_aspect and max(shape) > options.max_aspect * min(shape):
        raise PictureError(f"longer than --max-aspect {options.max_aspect:g}")
    shrinks = options.size and min(shape) > options.size
    if kind and not shrinks and options.format in ("", kind):
        return kind, data, shape
    return _encode(picture or open_picture(data), kind, options)


def _decoded(data: bytes, kind: str, options: Options) -> tuple[tuple[int, int], Image | None]:
    """(width, height), and the picture if it was decoded in full."""
    if kind == "jpg" and not options.size and options.format in ("", "jpg"):
        import simplejpeg

        height, width = decode(data, at_least=64).shape[:2]  # reads every byte but produces few pixels
        with contextlib.suppress(ValueError):  # raised for a JPEG that only Pillow decodes
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return (width, height), None
    picture = open_picture(data)
    return picture.size, picture


def _encode(picture: Image, kind: str, options: Options) -> tuple[str, bytes, tuple[int, int]]:
    if options.size and min(picture.size) > options.size:
        scale = options.size / min(picture.size)
        width, height = (max(options.size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), reducing_gap=3.0)
    extension = options.format or ("jpg" if kind == "jpg" else "png")
    out = io.BytesIO()
    picture.save(out, {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[extension], quality=options.quality)
    return extension, out.getvalue(), picture.size
