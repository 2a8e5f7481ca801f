"""Reads a folder of pictures with their captions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import read_captions, read_text_file
from dist_t2i.sharding.items import Item, Problem, add_captions, hold_out
from dist_t2i.sharding.pictures import PictureFile

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})
_Rows = Iterator[tuple[Path, str, tuple[str, ...]]]
"""(picture, where, captions)"""


def find_items(images: Path, captions: Path | None, holdout: float) -> tuple[list[Item], list[Problem]]:
    """The captioned pictures of a folder, sorted by key, and the problems of the other pictures. Raises DataError if
    the folder or the captions cannot be read.

    `captions` is a JSONL, CSV or TSV file whose paths are relative to `images` or to the file's own folder. If
    `captions` is None, each line of `a.txt` is a caption of `a.png`. A hash of the keys selects the share `holdout` of
    the pictures for the split `test`.
    """
    if not images.is_dir():
        raise DataError(f"--images {images}: this folder does not exist")
    problems: list[Problem] = []
    rows = _from_caption_file(images, captions, problems) if captions else _from_text_files(images, problems)
    captions_of: dict[Path, list[str]] = {}
    for path, where, texts in rows:
        for reason in add_captions(captions_of.setdefault(path, []), texts):
            problems.append(Problem(where, _relative(path, images), reason))
    bare = [_relative(path, images) for path, kept in captions_of.items() if not kept]
    problems += [Problem("", path, "picture is left without a caption") for path in bare]
    items = _keyed(images, {path: kept for path, kept in captions_of.items() if kept})
    hold_out(items, holdout)
    return items, problems


def _relative(path: Path, images: Path) -> str:
    return os.path.relpath(path, images).encode("utf-8", "backslashreplace").decode()


def _from_caption_file(images: Path, captions: Path, problems: list[Problem]) -> _Rows:
    """Yields each row of a caption file if the row's picture exists. Adds other rows and pictures to `problems`."""
    find, mentioned = functools.cache(_find), set[Path]()
    for row in read_captions(captions):
        if path := find(row.image, (images, captions.parent)):
            mentioned.add(path)
            yield path, row.where, row.captions
        else:
            name = row.image.encode("utf-8", "backslashreplace").decode()
            problems.append(Problem(row.where, name, row.problem or "picture is missing"))
    others = [_relative(path, images) for path in _pictures(images) if path not in mentioned]
    problems += [Problem("", path, "picture is not in the caption file") for path in others]


def _find(image: str, folders: tuple[Path, ...]) -> Path | None:
    if image and "\0" not in image:
        for folder in folders:
            path = Path(os.path.normpath(folder / image))
            with contextlib.suppress(OSError):  # for example, the name is too long
                if path.is_file():
                    return path
    return None


def _from_text_files(images: Path, problems: list[Problem]) -> _Rows:
    """Yields each picture that has a text file of the same name. Adds pictures without a text file to `problems`."""
    for path in _pictures(images):
        text = path.with_suffix(".txt")
        try:
            yield path, _relative(text, images), read_text_file(text) or ("",)
        except FileNotFoundError:
            problems.append(Problem("", _relative(path, images), "picture has no .txt of the same name"))
        except OSError as error:
            problems.append(Problem(_relative(text, images), _relative(path, images), f"{error.strerror}"))


def _pictures(images: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(images):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                yield Path(os.path.normpath(os.path.join(folder, name)))


def _keyed(images: Path, captions: dict[Path, list[str]]) -> list[Item]:
    """The items with unique keys. A key is a path without extension and dots, because a WebDataset key ends at the
    first dot."""
    items: dict[str, Item] = {}
    for path in sorted(captions, key=lambda path: _relative(path, images)):
        relative = PurePosixPath(_relative(path, images))
        parts = [part for part in relative.with_suffix("").parts if part not in ("..", "/")]
        key = "/".join(parts).replace(".", "_")
        if key in items:  # for example, a.jpg and a.png have the same key
            key = f"{key}_{relative.suffix[1:]}"
        while key in items:
            key += f"_{hashlib.sha256(str(relative).encode()).hexdigest()[:8]}"
        items[key] = Item(key, PictureFile(str(path)), captions[path])
    return [items[key] for key in sorted(items)]
