"""Decodes images to square uint8 RGB pictures at the training size, upright and on a white background.

libjpeg-turbo decodes JPEGs and meanwhile shrinks JPEGs that are at least twice as large as needed. Pillow decodes the
other formats in `FORMATS`, a list without formats such as EPS, whose decoding starts another program. The size of an
image is read from its header and checked before decoding, because a small file can unpack to gigabytes.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Literal

import numpy
import simplejpeg
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 2**26
"""The largest number of pixels of an image. Larger images are refused, because decoding would take over 200 MB."""
MIN_SIDE = 8
"""The smallest side of an image in pixels. Training learns nothing from a smaller image, so it is refused."""
_SCRATCH_BYTES = 2**25
_ORIENTATION = 0x0112
_BEFORE_EXIF = frozenset({*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD})
"""The JPEG markers of segments that may precede an EXIF segment: application data, comments and tables."""


class PictureError(ValueError):
    """An unusable image. The message is a phrase that does not contain the name of the image."""


def to_unit(images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Maps uint8 images from [0, 255] to [-1, 1]. The result has `dtype` (default: float32) and the memory format of
    `images`."""
    images = images.float() if dtype is None else images.to(dtype)
    return images.div(127.5).sub(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Maps images from [-1, 1] to uint8 [0, 255]. Values are rounded to the nearest integer and clamped."""
    return images.add(1).mul(127.5).round().clamp(0, 255).byte()


def check_size(width: int, height: int) -> None:
    """Raises PictureError if an image is too large or too small."""
    if width * height > MAX_PIXELS:
        raise PictureError(f"larger than {MAX_PIXELS // 10**6} million pixels")
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"smaller than {MIN_SIDE} pixels")


def open_picture(data: bytes) -> Image.Image:
    """The first frame of an image, in RGB and upright. Transparent parts become white, and 16-bit values are cut to 8
    bits. Raises PictureError if the image does not decode or has an unusable size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(*picture.size)
            picture.load()
            return to_rgb(upright(picture))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"larger than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # broken bytes can raise any error in Pillow's plugins
        raise PictureError("does not decode") from error


def upright(picture: Image.Image) -> Image.Image:
    """The image, rotated and mirrored according to its EXIF orientation."""
    return ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION, 1) != 1 else picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """The image in mode RGB. Raises PictureError for floating-point pixels, whose range is unknown."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):  # Pillow opens 16-bit pixels in the modes I;16 and I
        pixels = numpy.asarray(picture).astype(numpy.int64)
        return Image.fromarray((pixels.clip(0, 65535) >> 8).astype(numpy.uint8)).convert("RGB")
    if picture.mode == "F":
        raise PictureError("has floating-point pixels")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, from 1 to 8, by default 1. This parser is much faster than Pillow's."""
    start = _tiff_header(data)
    if not start:
        return 1
    order: Literal["little", "big"] = "little" if data[start : start + 2] == b"II" else "big"

    def number(offset: int, size: int) -> int:
        return int.from_bytes(data[start + offset : start + offset + size], order)

    entries = number(4, 4)
    for entry in range(entries + 2, entries + 2 + 12 * min(number(entries, 2), 64), 12):
        if number(entry, 2) == _ORIENTATION:
            orientation = number(entry + 8, 2)
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def _tiff_header(data: bytes) -> int:
    """The offset of the TIFF header in the EXIF segment of a JPEG; 0 if the JPEG has no EXIF segment."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and data[offset + 1] in _BEFORE_EXIF:
        if data[offset + 1] == 0xE1 and data[offset + 4 : offset + 10] == b"Exif\0\0":
            return offset + 10
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return 0


def apply_orientation(pixels: numpy.ndarray, orientation: int) -> numpy.ndarray:
    """Pixels [H, W, 3] turned upright according to an EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return numpy.ascontiguousarray(pixels)


class Scratch:
    """Reusable memory for one decoded image. Without reuse, the kernel would provide fresh pages for each image, and
    that takes a fifth of a JPEG's decoding time."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def of(self, size: int) -> bytearray | None:
        """Memory of at least `size` bytes. None if `size` is so large that keeping the memory is not worthwhile."""
        if size > _SCRATCH_BYTES:
            return None
        if len(self._memory) < size:
            self._memory = bytearray(size)
        return self._memory


def decode(data: bytes, at_least: int = 0, scratch: Scratch | None = None) -> numpy.ndarray:
    """Decodes an image to uint8 [H, W, 3], C-contiguous. A result in `scratch` is valid until the next call. If
    `at_least` is not 0, decoding may shrink a JPEG, but each side keeps at least `at_least` pixels. Raises PictureError
    if the image does not decode or has an unusable size."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            check_size(width, height)
            if space not in ("CMYK", "YCCK"):
                shrink = at_least if at_least and min(height, width) >= 2 * at_least else 0
                memory = scratch.of(height * width * 3) if scratch else None
                pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=shrink, min_width=shrink, buffer=memory)
                return apply_orientation(pixels, jpeg_orientation(data))
        except PictureError:
            raise
        except ValueError as error:
            if "CMYK" not in str(error):
                raise PictureError("does not decode") from error
    return numpy.array(open_picture(data))


def square(
    pixels: numpy.ndarray, size: int, crop: tuple[float, float, float] = (1.0, 0.5, 0.5), out: Tensor | None = None
) -> Tensor:
    """Cuts a square from the image and resizes it with antialiasing: uint8 [3, size, size]. `crop` has three numbers
    from 0 to 1: the side of the square as a share of the image's short side, then the horizontal and vertical position
    of the square (0 is the left or top edge). If given, `out` (channels last) receives the result."""
    import torch

    height, width = pixels.shape[:2]
    share, across, down = crop
    side = max(1, min(height, width, round(min(height, width) * share)))
    top, left = round((height - side) * down), round((width - side) * across)
    image = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)
    out = torch.empty(size, size, 3, dtype=torch.uint8).permute(2, 0, 1) if out is None else out
    if side == size:
        return out.copy_(image)
    # torch.nn.functional.interpolate(mode="bilinear", antialias=True) calls this operator but has no argument `out`.
    torch.ops.aten._upsample_bilinear2d_aa.out(image[None], [size, size], False, None, None, out=out[None])
    return out
