"""Prepares a picture for its shard: checks it, applies the filters, and shrinks or re-encodes it if requested."""

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
    """Options for writing a set."""

    size: int = 0
    """The maximal short side in pixels. Larger pictures are shrunk to this size; 0 shrinks no picture."""
    format: str = ""
    """The format in which every picture is encoded: `jpg`, `webp` or `png`. If this is "", only shrunk pictures and
    pictures of other formats are encoded."""
    quality: int = 95
    """The quality of the JPEGs and WebPs that are encoded."""
    check: str = "header"
    """How a picture is checked: `header` reads its header and its last bytes, `decode` decodes every pixel."""
    min_side: int = 0
    """The minimal short side in pixels. Smaller pictures are left out."""
    max_aspect: float = 0.0
    """The maximal ratio of long to short side. Longer pictures are left out; 0 keeps all pictures."""
    shard_samples: int = 10_000
    shard_mb: float = 512.0
    vocabulary: int = 4096
    processes: int = 1
    threads: int = 16
    """The number of parallel downloads in each process."""
    retry_failed: bool = False
    """Whether to write a shard again if one of its pictures could not be read."""
    about: dict[str, Any] = field(default_factory=dict)
    """The manifest's entries on the set: name, licence, credit."""


def prepare(data: bytes, options: Options) -> tuple[str, bytes, tuple[int, int]]:
    """The extension, the bytes and the stored (width, height) of a picture in its shard. Raises PictureError if the
    picture cannot be used or a filter rejects it.

    An intact JPEG, PNG or WebP keeps its bytes unless the picture is shrunk or converted. Any other picture is encoded
    in `options.format`. If `options.format` is "", a JPEG remains a JPEG, and other formats become PNG.
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
    """Decodes a picture as a check. Returns (width, height), and the decoded picture if it was decoded at full size."""
    if kind == "jpg" and not options.size and options.format in ("", "jpg"):
        import simplejpeg

        height, width = decode(data, at_least=64).shape[:2]  # fast, because few pixels are produced
        with contextlib.suppress(ValueError):  # only Pillow decodes this JPEG
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
