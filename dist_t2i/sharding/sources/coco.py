"""Reads MS-COCO 2014 or 2017 in its published layout (Lin et al. 2014, "Microsoft COCO: Common Objects in Context";
Chen et al. 2015, "Microsoft COCO Captions"). Uses Karpathy's split if its file is given (Karpathy & Fei-Fei 2015, "Deep
Visual-Semantic Alignments"). The part `restval` of Karpathy's split is used for training, as is common."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.items import Gathered, Item, Problem, captioned
from dist_t2i.sharding.pictures import PictureFile
from dist_t2i.sharding.sources.class_folders import files_of, first_folder

LAYOUT = """  DIR/train2014/COCO_train2014_000000000009.jpg ...      (2017: DIR/train2017/000000000009.jpg ...)
      val2014/COCO_val2014_000000000042.jpg ...                  DIR/val2017/000000000139.jpg ...
      annotations/captions_train2014.json                        DIR/annotations/captions_train2017.json
                  captions_val2014.json                                          captions_val2017.json
(Unpack train2014.zip, val2014.zip and annotations_trainval2014.zip, or the files of 2017, in one folder.)"""
CREDIT = (
    "MS-COCO (Lin et al. 2014, https://cocodataset.org). Captions: CC BY 4.0. Pictures: from Flickr, each under the "
    "licence that its owner chose."
)
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def coco_items(root: Path, year: int | None, karpathy: Path | None) -> Gathered:
    """The pictures with their captions, sorted by key. `year` may be None if `root` contains only one year of COCO.

    COCO's train becomes the split `train`, and COCO's val becomes the split `test`. If `karpathy` (the file of
    Karpathy's split) is given, the splits are Karpathy's train (including restval), val and test. Raises DataError if
    the files do not have COCO's layout or a caption file cannot be read.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    files: dict[str, set[str]] = {}
    year = 2014 if karpathy else year or _year_of(root)
    entries = _karpathy_entries(karpathy, problems) if karpathy else _entries(root, year, problems)
    for folder, name, image_id, captions, split, where in entries:
        if folder not in files:
            files[folder] = files_of(first_folder(root, (folder,), LAYOUT)) if folder.isalnum() else set()
        if name not in files[folder] or "/" in name:
            problems.append(Problem(where, f"{(root / folder).name}/{name}", "picture is missing"))
            continue
        key = name.rpartition(".")[0].replace(".", "_")
        item = Item(key, PictureFile(f"{root / folder}/{name}"), captions, split, {"image_id": image_id})
        items += captioned(item, where, problems)
    title = f"MS-COCO {year}" + (", Karpathy's split" if karpathy else "")
    about = {"name": title, "licence": "captions CC BY 4.0; pictures as on Flickr", "credit": CREDIT}
    return sorted(items, key=lambda item: item.key), problems, about


_Entry = tuple[str, str, Any, list[str], str, str]
"""A picture in a caption file: folder, file name, image id, captions, split, and position in the caption file."""


def _year_of(root: Path) -> int:
    if (root / "train2014").is_dir() and (root / "train2017").is_dir():
        raise DataError(f"{root} contains COCO 2014 and 2017: select one with --year")
    return int(first_folder(root, ("train2014", "train2017"), LAYOUT).name.removeprefix("train"))


def _read_lists(path: Path, *keys: str) -> list[list[dict[str, Any]]]:
    """The objects in the lists `keys` of a JSON file. Raises DataError if a list is missing."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Expected files:\n{LAYOUT}") from error
    except OSError as error:
        raise DataError(f"cannot read the captions {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): is the download incomplete?") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f'{path} has no list "{key}", so it is not a file of COCO captions')
    return [[entry for entry in content[key] if isinstance(entry, dict)] for key in keys]


def _entries(root: Path, year: int, problems: list[Problem]) -> Iterator[_Entry]:
    for part, split in ((f"train{year}", "train"), (f"val{year}", "test")):
        files = files_of(first_folder(root, (part,), LAYOUT))
        path = root / "annotations" / f"captions_{part}.json"
        images, annotations = _read_lists(path, "images", "annotations")
        names = {entry.get("id"): str(entry.get("file_name", "")) for entry in images}
        captions: dict[Any, list[str]] = {}
        for entry in annotations:
            if entry.get("image_id") in names:
                captions.setdefault(entry["image_id"], []).append(str(entry.get("caption", "")))
            else:
                where, image = f"{path.name}: {entry.get('id')}", str(entry.get("image_id"))
                problems.append(Problem(where, image, "caption of an unknown picture"))
        for number, name in names.items():
            yield part, name, number, captions.get(number, []), split, f"{path.name}: {number}"
        for name in sorted(files - set(names.values())):
            problems.append(Problem("", f"{part}/{name}", f"picture is not in {path.name}"))


def _karpathy_entries(path: Path, problems: list[Problem]) -> Iterator[_Entry]:
    (images,) = _read_lists(path, "images")
    for entry in images:
        folder, name, image_id = str(entry.get("filepath", "")), str(entry.get("filename", "")), entry.get("cocoid")
        split, sentences = _SPLITS.get(str(entry.get("split"))), entry.get("sentences")
        where = f"{path.name}: {image_id}"
        if split is None or not isinstance(sentences, list):
            reason = f"split is {entry.get('split')!r}" if sentences else "has no captions"
            problems.append(Problem(where, name, reason))
            continue
        captions = [str(sentence.get("raw", "")) for sentence in sentences if isinstance(sentence, dict)]
        yield folder, name, image_id, captions, split, where
