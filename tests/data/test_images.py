"""Pictures of all common kinds become upright RGB on white, or are refused with a reason."""

import io
import struct
import zlib

import numpy
import pytest
import torch
from PIL import Image

from dist_t2i.data.images import (
    PictureError,
    apply_orientation,
    decode,
    jpeg_orientation,
    open_picture,
    square,
    to_uint8,
    to_unit,
)
from pictures import encoded

RED = (250, 10, 20)


def near(pixel, expected, tolerance=12):
    return all(abs(int(a) - int(b)) <= tolerance for a, b in zip(pixel, expected, strict=True))


def quarters(size=(48, 32)):
    """Four colors, one in each corner, which show how a picture was rotated."""
    image = Image.new("RGB", size)
    half = size[0] // 2, size[1] // 2
    for place, color in enumerate([RED, (10, 240, 10), (20, 20, 230), (240, 240, 10)]):
        image.paste(color, (place % 2 * half[0], place // 2 * half[1], size[0], size[1]))
    return image


def png_header(width, height):
    """A PNG whose header states a size, but which has almost no data."""
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IHDR" + chunk
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    return header + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def sixteen_bit():
    return Image.fromarray(numpy.full((20, 20), 40_000, dtype=numpy.uint16))


def transparent():
    image = Image.new("RGBA", (20, 20), (*RED, 0))
    image.paste((*RED, 255), (0, 0, 10, 20))
    return image


def palette():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED] + [0] * 762)
    return image


def animated(kind):
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), (0, 0, 255))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "expected"),
    {
        "png": (encoded(Image.new("RGB", (20, 20), RED)), RED),
        "jpeg": (encoded(Image.new("RGB", (20, 20), RED), "JPEG"), RED),
        "cmyk jpeg": (encoded(Image.new("RGB", (20, 20), RED).convert("CMYK"), "JPEG"), RED),
        "grey jpeg": (encoded(Image.new("L", (20, 20), 100), "JPEG"), (100, 100, 100)),
        "16-bit grey": (encoded(sixteen_bit()), (156, 156, 156)),
        "16-bit tiff": (encoded(sixteen_bit(), "TIFF"), (156, 156, 156)),
        "palette": (encoded(palette()), RED),
        "transparent palette": (encoded(palette(), transparency=1), (255, 255, 255)),
        "alpha": (encoded(transparent()), RED),
        "grey alpha": (encoded(Image.new("LA", (20, 20), (0, 0))), (255, 255, 255)),
        "bilevel": (encoded(Image.new("1", (20, 20), 1)), (255, 255, 255)),
        "webp": (encoded(Image.new("RGB", (20, 20), RED), "WEBP", lossless=True), RED),
        "animated gif": (animated("GIF"), RED),
        "animated png": (animated("PNG"), RED),
        "animated webp": (animated("WEBP"), RED),
        "bmp": (encoded(Image.new("RGB", (20, 20), RED), "BMP"), RED),
    }.values(),
)
def test_kinds(data, expected):
    for pixels in (decode(data), decode(data, 8)):
        assert pixels.dtype == numpy.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.flags["C_CONTIGUOUS"] and near(pixels[pixels.shape[0] // 2, 1], expected), pixels[5, 1]


def test_transparency_shows_white():
    assert near(decode(encoded(transparent()))[10, 15], (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["little", "big"])
def test_orientation_as_pillow_has_it(orientation, order):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.endian = "<" if order == "little" else ">"
    data = encoded(quarters(), "JPEG", exif=exif, quality=95, subsampling=0)
    assert jpeg_orientation(data) == orientation
    expected = numpy.asarray(open_picture(data)).astype(int)
    assert numpy.abs(decode(data).astype(int) - expected).max() < 8
    png = encoded(quarters(), "PNG", exif=exif)
    assert numpy.array_equal(decode(png), apply_orientation(numpy.asarray(quarters()), orientation))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "does not decode"),
        (b"GIF89a", "does not decode"),
        (b"\xff\xd8 no jpeg", "does not decode"),
        (encoded(quarters(), "JPEG")[:-200], "does not decode"),
        (encoded(quarters((400, 400)))[:-300], "does not decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n", "does not decode"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"/>', "does not decode"),
        (encoded(Image.new("RGB", (1, 1))), "smaller than"),
        (encoded(Image.new("RGB", (1, 1)), "JPEG"), "smaller than"),
        (png_header(20_000, 20_000), "larger than"),
        (png_header(9_000, 9_000), "larger than"),
        (encoded(Image.new("F", (20, 20)), "TIFF"), "floating-point"),
    ],
)
def test_refused(data, reason):
    with pytest.raises(PictureError, match=reason):
        decode(data, 32)


def test_a_huge_jpeg_is_refused_from_its_header():
    data = bytearray(encoded(quarters(), "JPEG"))
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(PictureError, match="larger than"):
        decode(bytes(data), 32)


def test_jpegs_are_shrunk_while_they_are_decoded_but_never_below_the_target():
    data = encoded(quarters((640, 480)), "JPEG")
    assert decode(data).shape == (480, 640, 3)
    assert 64 <= min(decode(data, 64).shape[:2]) < 240
    assert decode(data, 300).shape == (480, 640, 3)


def test_square_takes_the_middle_and_keeps_what_fits():
    pixels = numpy.asarray(quarters((48, 32))).copy()
    same = square(pixels, 32)
    assert torch.equal(same, torch.from_numpy(pixels[:, 8:40]).permute(2, 0, 1))
    left, right = square(pixels, 32, (1.0, 0.0, 0.5)), square(pixels, 32, (1.0, 1.0, 0.5))
    assert torch.equal(left, torch.from_numpy(pixels[:, :32]).permute(2, 0, 1)) and not torch.equal(left, right)
    small = square(pixels, 8)
    assert small.shape == (3, 8, 8) and small.dtype == torch.uint8 and small.stride() == (1, 24, 3)
    assert near(small[:, 1, 1].tolist(), RED)
    assert square(pixels, 64, (0.5, 0.5, 0.5)).shape == (3, 64, 64)


def test_resizing_is_antialiased():
    stripes = numpy.zeros((64, 64, 3), dtype=numpy.uint8)
    stripes[:, ::2] = 255
    assert square(stripes, 16).float().std() < 20


def test_reading_does_not_depend_on_names():
    """A PNG with the extension .jpg is read as a PNG."""
    assert Image.open(io.BytesIO(encoded(quarters()))).format == "PNG"
    assert decode(encoded(quarters()), 8).shape == (32, 48, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_uint8_survives_the_way_to_unit_range_and_back(dtype):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit(pixels, dtype)
    assert unit.dtype == dtype and unit.min() == -1 and unit.max() == 1
    assert torch.equal(unit, pixels.to(dtype).div(127.5).sub(1.0)), "training computes exactly this"
    if dtype == torch.float32:
        assert torch.equal(to_uint8(unit), pixels) and torch.equal(to_unit(pixels), unit)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
