"""Exact and visual duplicates are removed in the same way by any number of processes."""

import json

import numpy
from PIL import Image

from dist_t2i.sharding.writing.duplicates import MAX_BITS, MAX_COLOR, look_of
from pictures import encoded
from shard_tool import captions_by_key, contents, problems, shard


def scene(number, size=(160, 120)):
    """A smooth picture with a shape that differs for every number."""
    coarse = numpy.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=numpy.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def said(folder, names):
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps({"image": name, "caption": f"this is {name}"}) + "\n" for name in names))
    return path


def test_exact(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(20):
        (images / f"a{number:02d}.jpg").write_bytes(encoded(scene(number), "JPEG"))
        if number % 3 == 0:
            (images / f"b{number:02d}.jpg").write_bytes(encoded(scene(number), "JPEG"))
    (images / "c00.jpg").write_bytes(encoded(scene(0), "JPEG", quality=60))
    captions = said(tmp_path, sorted(path.name for path in images.iterdir()))
    arguments = ["folder", "--images", images, "--captions", captions, "--deduplicate", "exact", "--shard-samples", 6]
    done = shard(*arguments, "--holdout", 0, "--out", tmp_path / "one", "--processes", 1)
    shard(*arguments, "--holdout", 0, "--out", tmp_path / "two", "--processes", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and "7 pictures repeat another" in done.stderr
    found = captions_by_key(tmp_path / "one")
    assert set(found) == {f"a{number:02d}" for number in range(20)} | {"c00"}
    assert found["a03"] == ("this is a03.jpg", "this is b03.jpg"), "a picture keeps the captions of its copies"
    expected = {(f"repeats a{n:02d}", f"b{n:02d}", "picture repeats another") for n in range(0, 20, 3)}
    assert problems(tmp_path / "one") == expected


def test_a_held_out_picture_is_not_trained_on(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(40):
        data = encoded(scene(number))
        (images / f"a{number:02d}.png").write_bytes(data)
        (images / f"b{number:02d}.png").write_bytes(data)
    captions = said(tmp_path, sorted(path.name for path in images.iterdir()))
    shard(
        *("folder", "--images", images, "--captions", captions, "--deduplicate", "exact", "--holdout", 0.4),
        *("--out", tmp_path / "set"),
    )
    train, test = (captions_by_key(tmp_path / "set", split) for split in ("train", "test"))
    assert {key[1:] for key in train}.isdisjoint(key[1:] for key in test) and len(train) + len(test) == 40


def test_perceptual(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(12):
        picture = scene(number)
        (images / f"a{number:02d}.png").write_bytes(encoded(picture))
        (images / f"b{number:02d}.jpg").write_bytes(encoded(picture, "JPEG", quality=70))
        (images / f"c{number:02d}.jpg").write_bytes(encoded(picture.resize((80, 60)), "JPEG", quality=85))
    for name, color in (("plain1", "red"), ("plain2", "blue"), ("plain3", "blue")):
        (images / f"{name}.png").write_bytes(encoded(Image.new("RGB", (64, 64), color)))
    (images / "broken.png").write_bytes(b"no picture")
    captions = said(tmp_path, sorted(path.name for path in images.iterdir()))
    arguments = ["folder", "--images", images, "--captions", captions, "--deduplicate", "perceptual", "--holdout", 0]
    shard(*arguments, "--out", tmp_path / "one", "--processes", 1)
    shard(*arguments, "--out", tmp_path / "two", "--processes", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(captions_by_key(tmp_path / "one")) == {f"a{number:02d}" for number in range(12)} | {"plain1", "plain2"}
    listed = problems(tmp_path / "one")
    assert ("repeats a05", "c05", "picture repeats another") in listed and (
        "",
        "broken",
        "picture does not decode",
    ) in listed


def test_the_hash_bears_what_it_should(tmp_path):
    def differ(a, b):
        first, second = look_of(a), look_of(b)
        colors = max(abs(x - y) for x, y in zip(first[1], second[1], strict=True))
        return (first[0] ^ second[0]).bit_count(), colors

    for number in range(20):
        picture = scene(number, (640, 480))
        whole = encoded(picture, compress_level=1)
        small = encoded(picture.resize((320, 240), Image.Resampling.LANCZOS), "WEBP", quality=60)
        bits, colors = differ(whole, small)
        assert bits <= MAX_BITS and colors <= MAX_COLOR
        assert differ(whole, encoded(scene(number + 100)))[0] > 10
    assert look_of(b"nothing") is None
