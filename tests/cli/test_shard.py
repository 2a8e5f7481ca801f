"""tools/shard.py as users run it: on good and bad pictures, interrupted, and twice."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import webdataset
from PIL import Image

from dist_t2i.data.scenes import attributes, render, sample_scene
from dist_t2i.data.shard_set import open_set
from pictures import color, config_for, encoded, make_folder, picture, stream_of
from shard_tool import ROOT, TOOL, captions_by_key, contents, reasons, shard

# The sources


@pytest.mark.slow
def test_openmoji(tmp_path):
    pytest.importorskip("resvg_py")
    done = shard("openmoji", "--size", 16, "--out", tmp_path / "set")
    assert "train: 3,604 pictures" in done.stdout and "pictures/s" not in done.stdout
    data_set = open_set(tmp_path / "set")
    assert data_set.splits == ("train", "test-combinations", "test-nouns")
    assert len(data_set.manifest["splits"]["train"]["shards"]) == 4
    sample = data_set.samples("test-combinations")[0]
    assert sample.image.size == (16, 16) and sample.attributes["tone"] in ("light", "dark")
    assert sample.captions[0].startswith(sample.attributes["role"][:3])
    for name in ("manifest.json", "README.md", "report.html"):
        assert "CC BY-SA 4.0" in (tmp_path / "set" / name).read_text()
    assert data_set.manifest["splits"]["test-combinations"]["captions"]["words_not_in_train"] == 0
    assert data_set.manifest["splits"]["test-nouns"]["captions"]["words_not_in_train"] > 50


def test_scenes(tmp_path):
    arguments = ["scenes", "--count", 60, "--size", 32, "--shard-samples", 25]
    for name, more in (("one", ["--processes", 1]), ("two", ["--processes", 2]), ("other", ["--seed", 1])):
        shard(*arguments, *more, "--out", tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["train-00000.tar"] != contents(tmp_path / "other")["train-00000.tar"]
    data_set = open_set(tmp_path / "one")
    assert data_set.manifest["name"] == "scenes" and data_set.splits == ("train", "test-combinations")
    assert sum(len(data_set.samples(split)) for split in data_set.splits) == 60
    for sample in data_set.samples("train"):
        scene = sample_scene(0, int(sample.key))
        assert (numpy.asarray(sample.image) == render(scene, 32)).all()
        assert {name: sample.attributes[name] for name in attributes(scene)} == json.loads(
            json.dumps(attributes(scene))
        )
        assert len(sample.captions) >= 4


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "txt"])
def test_captions_in_every_form_make_the_same_set(tmp_path, form):
    images = tmp_path / "pictures"
    make_folder(images, 12)
    (images / "captions.jsonl").unlink()
    texts = {number: [f'"quoted", number {number}', f"a, b and é {number}"] for number in range(12)}
    if form == "jsonl":
        lines = [json.dumps({"image": f"p{n:04d}.png", "captions": said}) for n, said in texts.items()]
    elif form == "csv":
        lines = ["image,caption"]
        lines += [
            f'./p{n:04d}.png,"{text.replace(chr(34), chr(34) * 2)}"' for n, said in texts.items() for text in said
        ]
    elif form == "tsv":
        lines = ["caption\timage"] + [f"{text}\tp{n:04d}.png" for n, said in texts.items() for text in said]
    else:
        for number, said in texts.items():
            (images / f"p{number:04d}.txt").write_text("\n".join(said) + "\n\n", encoding="utf-8")
    arguments = ["folder", "--images", images, "--out", tmp_path / "set", "--shard-samples", 5, "--processes", 1]
    if form != "txt":
        # A byte order mark and Windows line ends, as spreadsheets write them.
        (tmp_path / f"said.{form}").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
        arguments += ["--captions", tmp_path / f"said.{form}"]
    shard(*arguments)
    assert captions_by_key(tmp_path / "set") == {f"p{n:04d}": tuple(said) for n, said in texts.items()}
    assert reasons(tmp_path / "set") == set()
    expected = {f"train-0000{n}.{kind}" for n in range(3) for kind in ("tar", "index")}
    expected |= {"manifest.json", "tokenizer.json", "report.html", "contact_sheet.png", "bad_samples.jsonl"}
    assert set(contents(tmp_path / "set")) == expected


def test_many_captions_a_picture_many_pictures_a_caption(tmp_path):
    images = tmp_path / "pictures"
    make_folder(images, 3)
    lines = ["image,caption", "p0000.png,shared", "p0001.png,shared", "p0000.png,second", "p0000.png,second"]
    (tmp_path / "said.csv").write_text("\n".join(lines))
    shard("folder", "--images", images, "--captions", tmp_path / "said.csv", "--out", tmp_path / "set")
    assert captions_by_key(tmp_path / "set") == {"p0000": ("shared", "second"), "p0001": ("shared",)}
    assert reasons(tmp_path / "set") == {("p0002.png", "picture is not in the caption file")}


def test_paths_relative_to_the_caption_file_and_columns_of_other_names(tmp_path):
    make_folder(tmp_path / "data" / "images", 2)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\nimages/p0000.png,one\np0001.png,two\n")
    done = shard("folder", "--images", "images", "--captions", "metadata.csv", "--out", "../set", cwd=tmp_path / "data")
    assert captions_by_key(tmp_path / "set") == {"p0000": ("one",), "p0001": ("two",)}
    assert "set: ../set" in done.stdout


# Bad input


def plant_bad_pictures(images):
    """Writes good, odd and unusable pictures; returns the expected reason for each unusable picture."""
    red = Image.new("RGB", (30, 20), (250, 10, 20))
    usable = {
        "good.png": encoded(red),
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(red.convert("L"), "JPEG"),
        "deep.png": encoded(Image.fromarray(numpy.full((20, 20), 40_000, dtype=numpy.uint16))),
        "palette.png": encoded(red.convert("P")),
        "alpha.png": encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 0))),
        "moving.gif": encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (30, 20))]),
        "moving.webp": encoded(red, "WEBP", save_all=True, append_images=[Image.new("RGB", (30, 20))]),
        "called.a.png.jpg": encoded(red),
        "spaces and é.png": encoded(red),
        "a/x.png": encoded(picture(1)),
        "b/x.png": encoded(picture(2)),
        "b/x.jpg": encoded(picture(3), "JPEG"),
    }
    bomb = bytearray(encoded(red, "JPEG"))
    at = bomb.find(b"\xff\xc0") + 5
    bomb[at : at + 4] = (20_000).to_bytes(2, "big") * 2
    unusable = {
        "broken.png": (encoded(red)[:60], "picture does not decode"),
        "cut.jpg": (encoded(picture(5, (300, 300)), "JPEG")[:-400], "picture does not decode"),
        "text.jpg": (b"not a picture", "picture does not decode"),
        "empty.png": (b"", "picture does not decode"),
        "dot.png": (encoded(Image.new("RGB", (1, 1))), "picture smaller than 8 pixels"),
        "bomb.jpg": (bytes(bomb), "picture larger than 67 million pixels"),
    }
    for name, data in (usable | {name: data for name, (data, _) in unusable.items()}).items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(data)
    return usable, {Path(name).stem: reason for name, (_, reason) in unusable.items()}


def test_bad_pictures_are_listed_and_the_rest_is_used(tmp_path):
    images = tmp_path / "pictures"
    usable, unusable = plant_bad_pictures(images)
    names = [path.relative_to(images).as_posix() for path in images.rglob("*.*")]
    said = "".join(json.dumps({"image": name, "caption": f"this is {name}"}) + "\n" for name in names)
    (tmp_path / "said.jsonl").write_text(said)
    done = shard("folder", "--images", images, "--captions", tmp_path / "said.jsonl", "--out", tmp_path / "set")
    assert reasons(tmp_path / "set") == set(unusable.items())
    assert "left out or changed: 4 x picture does not decode" in done.stdout
    report = (tmp_path / "set" / "report.html").read_text()
    assert all(reason in report and key in report for key, reason in unusable.items())

    found = captions_by_key(tmp_path / "set")
    assert len(found) == len(usable) and {"a/x", "b/x", "b/x_png"} <= set(found)
    assert sorted(text for (text,) in found.values()) == sorted(f"this is {name}" for name in usable)
    for sample in open_set(tmp_path / "set").samples("train"):
        assert sample.image.mode == "RGB" and min(sample.image.size) >= 20
    config = config_for(open_set(tmp_path / "set"), batch=2 * len(usable), on_bad="strict")
    batch = next(stream_of(config, open_set(tmp_path / "set").tokenizer))
    assert len(set(batch.keys)) == len(usable)
    plain = webdataset.WebDataset(str(tmp_path / "set" / "train-00000.tar"), shardshuffle=False).decode("pil")
    assert len(list(plain)) == len(usable)


def test_bad_captions_are_listed_and_the_rest_is_used(tmp_path):
    images = tmp_path / "pictures"
    make_folder(images, 12)
    (images / "captions.jsonl").unlink()
    good = [json.dumps({"image": f"p{n:04d}.png", "caption": f"number {n}"}).encode() for n in range(4)]
    bad = [
        (b'{"image": "p0004.png", "caption": ""}', "p0004.png", "caption is empty"),
        (b'{"image": "p0005.png", "caption": "caf\xe9"}', "p0005.png", "caption is not UTF-8"),
        (b'{"image": "p0006.png", "caption": "' + b"word " * 2000 + b'"}', "p0006.png", "caption is too long, cut"),
        (b'{"image": "nowhere.png", "caption": "a"}', "nowhere.png", "picture is missing"),
        (b'{"image": "p0007.png", "caption": "a"', "said.jsonl:9", "line is not JSON"),
        (b"[1, 2]", "said.jsonl:10", 'line has no "image"'),
        (b'{"image": "p0008.png"}', "p0008.png", "caption is empty"),
        (b'{"image": "p0009.png", "captions": [1]}', "said.jsonl:12", "captions are no text"),
        (b'{"image": "p0010.png", "caption": "\\ud800"}', "p0010.png", "caption is not UTF-8"),
        (b'{"image": "p0011.png", "captions": ["", "kept"]}', "p0011.png", "caption is empty"),
        (b'{"image": "../pictures", "caption": "a"}', "../pictures", "picture is missing"),
    ]
    (tmp_path / "said.jsonl").write_bytes(b"\n".join(good + [line for line, _, _ in bad]))
    shard("folder", "--images", images, "--captions", tmp_path / "said.jsonl", "--out", tmp_path / "set")
    listed = reasons(tmp_path / "set")
    assert {(where, reason) for _, where, reason in bad} <= listed
    found = captions_by_key(tmp_path / "set")
    assert {key for key, _ in found.items()} == {"p0000", "p0001", "p0002", "p0003", "p0006", "p0011"}
    assert found["p0011"] == ("kept",) and 900 < len(found["p0006"][0]) <= 1000
    assert ("p0004.png", "picture is left without a caption") in listed


def test_a_latin_1_table_loses_the_lines_that_are_not_utf_8_and_says_so(tmp_path):
    make_folder(tmp_path / "pictures", 3)
    lines = "image;caption\np0000.png;café\np0001.png;tea\n".replace(";", ",").encode("latin-1")
    (tmp_path / "said.csv").write_bytes(lines)
    shard("folder", "--images", tmp_path / "pictures", "--captions", tmp_path / "said.csv", "--out", tmp_path / "set")
    assert captions_by_key(tmp_path / "set") == {"p0001": ("tea",)}
    assert ("p0000.png", "caption is not UTF-8") in reasons(tmp_path / "set")


def test_utf_16_as_windows_programs_write_it(tmp_path):
    make_folder(tmp_path / "pictures", 2)
    (tmp_path / "said.tsv").write_bytes("image\tcaption\r\np0000.png\tcafé\r\n".encode("utf-16"))
    shard("folder", "--images", tmp_path / "pictures", "--captions", tmp_path / "said.tsv", "--out", tmp_path / "set")
    assert captions_by_key(tmp_path / "set") == {"p0000": ("café",)}


def test_a_quotation_mark_that_is_never_closed_is_reported(tmp_path):
    make_folder(tmp_path / "pictures", 100)
    lines = ["image,caption", 'p0000.png,"oops'] + [f"p{n:04d}.png,number {n}" for n in range(1, 100)]
    (tmp_path / "said.csv").write_text("\n".join(lines))
    done = shard(
        *("folder", "--images", tmp_path / "pictures", "--captions", tmp_path / "said.csv", "--out", tmp_path / "set"),
        check=False,
    )
    assert done.returncode == 2 and "quotation mark is never closed" in done.stderr and "said.csv:2-101" in done.stderr


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda t: ["--images", t / "none", "--out", t / "set"], "this folder does not exist"),
        (
            lambda t: ["--images", t / "pictures", "--captions", t / "no.csv", "--out", t / "set"],
            "cannot read the captions",
        ),
        (lambda t: ["--images", t / "pictures", "--captions", t / "a.doc", "--out", t / "set"], ".jsonl, .csv or .tsv"),
        (
            lambda t: ["--images", t / "pictures", "--captions", t / "odd.csv", "--out", t / "set"],
            "`image` and `caption`",
        ),
        (
            lambda t: ["--images", t / "pictures", "--captions", t / "void.csv", "--out", t / "set"],
            "is left to train on",
        ),
        (lambda t: ["--images", t / "pictures", "--out", t / "set"], "picture has no .txt of the same name"),
        (lambda t: ["--images", t / "empty", "--out", t / "set"], "no picture was found"),
        (lambda t: ["--images", t / "bad", "--out", t / "set"], "picture does not decode"),
        (lambda t: ["--images", t / "good", "--out", t / "a.doc" / "set"], "cannot write to --out"),
        (lambda t: ["--images", t / "good", "--out", t / "pictures"], "is not empty"),
    ],
)
def test_mistakes_get_a_message_and_status_2(tmp_path, arrange, message):
    make_folder(tmp_path / "pictures", 3)
    for name in ("empty", "bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    (tmp_path / "bad" / "a.txt").write_text("a caption")
    (tmp_path / "good" / "a.png").write_bytes(encoded(picture(1)))
    (tmp_path / "good" / "a.txt").write_text("a caption")
    (tmp_path / "a.doc").write_text("")
    (tmp_path / "odd.csv").write_text("x,y\n1,2\n")
    (tmp_path / "void.csv").write_text("image,caption\n")
    done = shard("folder", *arrange(tmp_path), check=False)
    assert done.returncode == 2 and "error: " in done.stderr and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "set").glob("*.tar"))


# Splits, sizes, shards


def test_held_out_pictures(tmp_path):
    captions = make_folder(tmp_path / "pictures", 60)
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions]
    shard(*base, "--out", tmp_path / "few")
    shard(*base, "--out", tmp_path / "half", "--holdout", 0.5, "--shard-samples", 7)
    shard(*base, "--out", tmp_path / "none", "--holdout", 0)
    few, half, none = (open_set(tmp_path / name) for name in ("few", "half", "none"))
    assert none.splits == ("train",) and few.splits == half.splits == ("train", "test")
    keys = {name: {sample.key for sample in half.samples(name)} for name in half.splits}
    assert keys["train"].isdisjoint(keys["test"]) and len(keys["train"] | keys["test"]) == 60
    assert 18 < len(keys["test"]) < 42 and 1 <= len(few.samples("test")) <= 4
    assert {sample.key for sample in few.samples("test")} <= keys["test"], "a larger share keeps what a smaller one had"
    assert max(shard["samples"] for shard in half.manifest["splits"]["train"]["shards"]) == 7


def test_bytes_pass_through_or_are_shrunk(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    data = {
        "big.jpg": encoded(picture(1, (300, 200)), "JPEG", quality=80),
        "big.png": encoded(picture(2, (200, 300))),
        "small.png": encoded(picture(3, (40, 40))),
        "old.bmp": encoded(picture(4, (300, 200)), "BMP"),
    }
    for name, content in data.items():
        (images / name).write_bytes(content)
        (images / name).with_suffix(".txt").write_text(f"one of them, {name}")
    shard("folder", "--images", images, "--out", tmp_path / "same")
    shard("folder", "--images", images, "--out", tmp_path / "small", "--size", 64)
    same = {sample.key: sample for sample in open_set(tmp_path / "same").samples("train")}
    small = {sample.key: sample for sample in open_set(tmp_path / "small").samples("train")}
    assert set(same) == {"big", "big_png", "small", "old"}
    for key, name in (("big", "big.jpg"), ("big_png", "big.png"), ("small", "small.png")):
        assert same[key].image_bytes == data[name]
    assert same["old"].extension == "png" and same["old"].image.size == (300, 200)
    assert small["big"].image.size == (96, 64) and small["big"].extension == "jpg"
    assert small["big_png"].image.size == (64, 96) and small["big_png"].extension == "png"
    assert small["small"].image_bytes == data["small.png"] and small["old"].image.size == (96, 64)
    assert all(abs(a - b) < 6 for a, b in zip(small["old"].image.getpixel((80, 30)), color(4), strict=True))
    assert open_set(tmp_path / "small").manifest["image_size"] == 64


def test_shards_that_end_up_empty_leave_no_gap(tmp_path):
    images = tmp_path / "pictures"
    make_folder(images, 8)
    (images / "captions.jsonl").unlink()
    for number in range(8):
        (images / f"p{number:04d}.txt").write_text("a caption")
    order = sorted(range(8), key=lambda n: hashlib.sha256(f"p{n:04d}".encode()).digest())
    for number in order[2:4]:
        (images / f"p{number:04d}.png").write_bytes(b"broken")
    arguments = ["folder", "--images", images, "--out", tmp_path / "set", "--shard-samples", 2]
    shard(*arguments)
    names = [shard["name"] for shard in open_set(tmp_path / "set").manifest["splits"]["train"]["shards"]]
    assert names == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert (
        len(open_set(tmp_path / "set").samples("train")) == len(list(open_set(tmp_path / "set").samples("train"))) == 6
    )
    before = contents(tmp_path / "set")
    shard(*arguments)
    assert contents(tmp_path / "set") == before
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == names


# Twice


def test_the_same_input_makes_the_same_bytes_anywhere(tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        captions = make_folder(tmp_path / name / "pictures", 60)
        shard(
            *("folder", "--images", tmp_path / name / "pictures", "--captions", captions),
            *("--out", tmp_path / name / "set", "--shard-samples", 9, "--processes", processes),
        )
    assert contents(tmp_path / "one" / "set") == contents(tmp_path / "two" / "set")


def test_a_rerun_keeps_whole_shards_and_mends_the_rest(tmp_path):
    captions = make_folder(tmp_path / "pictures", 40)
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--out", tmp_path / "set"]
    base += ["--shard-samples", 8]
    shard(*base)
    before = contents(tmp_path / "set")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    hurt = tmp_path / "set" / "train-00001.tar"
    hurt.write_bytes(hurt.read_bytes()[:-3000])
    (tmp_path / "set" / "train-00002.index").unlink()
    (tmp_path / "set" / "manifest.json").unlink()
    done = shard(*base)
    assert contents(tmp_path / "set") == before and "3 of 5 shards exist already" in done.stderr
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    assert {name for name in now if now[name] != times[name]} == {"train-00001.tar", "train-00002.tar"}
    other = shard(*base, "--size", 20, check=False)
    assert other.returncode == 2 and "contains a set from other pictures" in other.stderr


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_interrupted_it_goes_on(tmp_path, name):
    captions = make_folder(tmp_path / "pictures", 400)
    arguments = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", "20"]
    shard(*arguments, "--out", tmp_path / "whole")
    command = [sys.executable, ROOT / "tools" / "shard.py", *arguments, "--out", tmp_path / "set"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 60
    while not list((tmp_path / "set").glob("*.tar")) and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(process.pid, getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert process.returncode == (-9 if name == "SIGKILL" else 130)
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert b"Traceback" not in error and (name == "SIGKILL" or b"run the same command again" in error)
    shard(*arguments, "--out", tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(TOOL), "folder", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert "a.txt" in done.stdout and not re.search(r"\| +(torch|deepspeed|numpy|PIL|fsspec)\b", done.stderr)
