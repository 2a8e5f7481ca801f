"""What makes sharding fast: a writer of tars like tarfile's, headers without decoding, and files read in one call."""

import hashlib
import os
import zlib

import pytest
from PIL import Image

from dist_t2i.sharding.pictures import PictureFile
from dist_t2i.sharding.writing.headers import kind_of, measure
from dist_t2i.sharding.writing.tar_writer import TarWriter
from pictures import encoded, picture
from tars import write_tar


@pytest.mark.parametrize("expected", [0, 100, 10_000_000])
def test_a_tar_is_byte_for_byte_that_of_tarfile(tmp_path, expected):
    names = ["a.jpg", "some/dir/b.json", "é.png", "n" * 99 + ".txt", "long/" * 40 + "c.jpg"]
    files = [(name, os.urandom(size)) for name in names for size in (0, 1, 511, 512, 513, 5000, 1_200_000)]
    with TarWriter(tmp_path / "ours.tar", expected) as ours:
        placed = [ours.add(name, data) for name, data in files]
        ours.finish()
    written = (tmp_path / "ours.tar").read_bytes()
    assert written == write_tar(tmp_path / "theirs.tar", files).read_bytes()
    assert ours.size == len(written) and ours.sha256 == hashlib.sha256(written).hexdigest()
    for (offset, size, crc), (_, data) in zip(placed, files, strict=True):
        assert written[offset : offset + size] == data and crc == zlib.crc32(data)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_headers_say_what_decoding_says(mode, kind, options):
    data = encoded(picture(3, (123, 45)).convert(mode), kind, **options)
    assert measure(data) == (123, 45) and kind_of(data) in ("jpg", "png", "webp")
    assert all(measure(data[:size]) is None for size in range(0, len(data), 7)), "what is cut gets no answer"


def test_what_is_unusual_gets_no_answer():
    image = picture(1)
    odd = [
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
        encoded(image, "GIF"),
        encoded(image, "JPEG") + b"\0\0",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + b"\xff\xe0\x00\x00" * 100 + b"\xff\xd9",
        b"",
    ]
    assert [measure(data) for data in odd] == [None] * len(odd)
    damaged = bytearray(encoded(image, "PNG"))
    damaged[18] ^= 1
    assert measure(bytes(damaged)) is None, "a header of PNG has a checksum"


@pytest.mark.parametrize("size", [0, 10, 2**18 - 1, 2**18, 2**18 + 1, 3_000_000])
def test_a_file_is_read_whole(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert PictureFile(str(tmp_path / "a")).read() == data
