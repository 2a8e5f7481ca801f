"""From the bytes of a picture to those that a shard holds: looked at, perhaps filtered, shrunk, re-encoded."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_t2i.data.images import MAX_PIXELS, MIN_SIDE, PictureError, check_size, decode, open_picture
from dist_t2i.sharding.writing.headers import kind_of, measure

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Options:
    """How a set is written."""

    size: int = 0
    """Larger pictures are shrunk to this short side, in pixels; 0 keeps their bytes."""
    format: str = ""
    """Re-encode every picture as `jpg`, `webp` or `png`; "" does so only with those that change, or that no reader knows."""
    quality: int = 95
    """Of the JPEGs and WebPs that are encoded."""
    check: str = "header"
    """How a picture is seen to be whole: by its `header` and end, or by a `decode` of every pixel."""
    min_side: int = 0
    """Pictures with a shorter side, in pixels, are left out."""
    max_aspect: float = 0.0
    """Pictures whose long side is more than this times the short one are left out; 0 keeps all."""
    shard_samples: int = 10_000
    shard_mb: float = 512.0
    vocabulary: int = 4096
    processes: int = 1
    threads: int = 16
    """Downloads at once in each process."""
    retry_failed: bool = False
    """Write again the shards in which a picture could not be read."""
    about: dict[str, Any] = field(default_factory=dict)
    """Goes into the manifest: name, licence, credit."""

    def shaping(self) -> list[Any]:
        """The options that decide what is in the shards."""
        return [self.size, self.format, self.quality, self.check, self.min_side, self.max_aspect]


def prepare(data: bytes, options: Options) -> tuple[str, bytes, tuple[int, int]]:
    """Extension, bytes, and (width, height) of the picture as it is stored. Raises PictureError.

    A JPEG, PNG or WebP that neither shrinks nor changes its format passes through untouched once it has been seen to
    be whole; all else becomes `options.format`, by default a PNG, or a JPEG if it was one.
    """
    kind = kind_of(data)
    shape = measure(data) if options.check == "header" else None
    picture: Image | None = None
    if shape is None:
        shape, picture = _decoded(data, kind, options)
    if min(shape) < MIN_SIDE or shape[0] * shape[1] > MAX_PIXELS or options.min_side or options.max_aspect:
        _check(shape, options)
    shrinks = options.size and min(shape) > options.size
    if kind and not shrinks and options.format in ("", kind):
        return kind, data, shape
    return _encode(data, picture, kind, options)


def _decoded(data: bytes, kind: str, options: Options) -> tuple[tuple[int, int], Image | None]:
    if kind == "jpg" and not options.size and options.format in ("", "jpg"):
        height, width = decode(data, at_least=64).shape[:2]  # every byte is read, few pixels are made
        return _jpeg_shape(data) or (width, height), None
    picture = open_picture(data)
    return picture.size, picture


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return width, height


def _check(shape: tuple[int, int], options: Options) -> None:
    check_size(*shape)
    if min(shape) < options.min_side:
        raise PictureError(f"smaller than --min-side {options.min_side}")
    if options.max_aspect and max(shape) > options.max_aspect * min(shape):
        raise PictureError(f"longer than --max-aspect {options.max_aspect:g}")


def _encode(data: bytes, picture: Image | None, kind: str, options: Options) -> tuple[str, bytes, tuple[int, int]]:
    picture = picture or open_picture(data)
    if options.size and min(picture.size) > options.size:
        scale = options.size / min(picture.size)
        shape = [max(options.size, round(side * scale)) for side in picture.size]
        picture = picture.resize((shape[0], shape[1]), reducing_gap=3.0)
    extension = options.format or ("jpg" if kind == "jpg" else "png")
    out = io.BytesIO()
    if extension == "png":
        picture.save(out, "PNG")
    else:
        picture.save(out, {"jpg": "JPEG", "webp": "WEBP"}[extension], quality=options.quality)
    return extension, out.getvalue(), picture.size
