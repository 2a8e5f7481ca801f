"""A folder of pictures with their captions, as items for the writer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import read_captions, read_text_file
from dist_t2i.sharding.items import Item, Problem, _add_captions, hold_out
from dist_t2i.sharding.pictures import PictureFile

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})


def find_items(images: Path, captions: Path | None, holdout: float) -> tuple[list[Item], list[Problem]]:
    """The pictures of a folder that have captions, sorted by key, and what was wrong with the rest.

    `captions` is a JSONL, CSV or TSV file whose paths are relative to `images` (or to the file's own folder); without
    one the captions of `a.png` are the lines of `a.txt` beside it. A share `holdout` of the pictures, named by a hash
    of their keys, has the split `test`.

    Raises: DataError when the folder or file cannot be read.
    """
    if not images.is_dir():
        raise DataError(f"--images {images}: there is no such folder")
    problems: list[Problem] = []
    pairs = _listed(images, captions, problems) if captions else _beside(images, problems)
    found: dict[Path, list[str]] = {}
    for path, where, texts in pairs:
        for reason in _add_captions(found.setdefault(path, []), texts):
            problems.append(Problem(where, _relative(path, images), reason))
    for path, held in found.items():
        if not held:
            problems.append(Problem("", _relative(path, images), "picture is left without a caption"))
    items = _keyed(images, {path: held for path, held in found.items() if held})
    hold_out(items, holdout)
    return items, problems


def _relative(path: Path, images: Path) -> str:
    text = os.path.relpath(path, images)
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(images: Path, captions: Path, problems: list[Problem]) -> Iterator[tuple[Path, str, tuple[str, ...]]]:
    """(picture, where, captions) of each row of a caption file whose picture exists."""
    known: dict[str, Path | None] = {}
    for row in read_captions(captions):
        if row.problem:
            problems.append(Problem(row.where, "", row.problem))
            continue
        if row.image not in known:
            known[row.image] = _find(row.image, (images, captions.parent))
        path = known[row.image]
        if path is None:
            name = row.image.encode("utf-8", "backslashreplace").decode()
            problems.append(Problem(row.where, name, "picture is missing"))
        else:
            yield path, row.where, row.captions
    mentioned = {path for path in known.values() if path}
    for path in _pictures(images):
        if path not in mentioned:
            problems.append(Problem("", _relative(path, images), "picture is in no line of the captions"))


def _find(image: str, folders: tuple[Path, ...]) -> Path | None:
    if not image or "\0" in image:
        return None
    for folder in folders:
        path = Path(os.path.normpath(folder / image))
        try:
            if path.is_file():
                return path
        except OSError:  # such as a name that is too long
            pass
    return None


def _beside(images: Path, problems: list[Problem]) -> Iterator[tuple[Path, str, tuple[str, ...]]]:
    """(picture, where, captions) of each picture with a text file beside it."""
    for path in _pictures(images):
        text = path.with_suffix(".txt")
        try:
            yield path, _relative(text, images), read_text_file(text) or ("",)
        except FileNotFoundError:
            problems.append(Problem("", _relative(path, images), "picture has no .txt beside it"))
        except OSError as error:
            problems.append(Problem(_relative(text, images), _relative(path, images), f"{error.strerror}"))


def _pictures(images: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(images):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                yield Path(os.path.normpath(os.path.join(folder, name)))


def _keyed(images: Path, found: dict[Path, list[str]]) -> list[Item]:
    """Items with one key each: the path without its extension, dots replaced (a WebDataset key ends at a dot)."""
    items: dict[str, Item] = {}
    for path in sorted(found, key=lambda path: _relative(path, images)):
        relative = PurePosixPath(Path(_relative(path, images)).as_posix())
        parts = [part for part in relative.with_suffix("").parts if part not in ("..", "/")]
        key = "/".join(parts).replace(".", "_")
        if key in items:  # a.png and a.jpg
            key = f"{key}_{relative.suffix[1:]}"
        while key in items:
            key += f"_{hashlib.sha256(str(relative).encode()).hexdigest()[:8]}"
        items[key] = Item(key, PictureFile(str(path)), found[path])
    return [items[key] for key in sorted(items)]
