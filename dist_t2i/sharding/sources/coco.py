"""MS-COCO, 2014 or 2017, as it is distributed; with Karpathy's split when its file is named.

Sources: Lin et al., "Microsoft COCO: Common Objects in Context" (2014) and Chen et al., "Microsoft COCO Captions" (2015)
for the files; Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments" (2015) for the split, whose `restval` the field
trains on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.items import Item, Problem, captioned
from dist_t2i.sharding.pictures import PictureFile
from dist_t2i.sharding.sources.class_folders import files_of, first_folder

LAYOUT = """  DIR/train2014/COCO_train2014_000000000009.jpg ...      (2017: DIR/train2017/000000000009.jpg ...)
      val2014/COCO_val2014_000000000042.jpg ...                  DIR/val2017/000000000139.jpg ...
      annotations/captions_train2014.json                        DIR/annotations/captions_train2017.json
                  captions_val2014.json                                          captions_val2017.json
(train2014.zip, val2014.zip and annotations_trainval2014.zip, unpacked in one folder; likewise for 2017)"""
CREDIT = (
    "MS-COCO (Lin et al. 2014, https://cocodataset.org). Captions: CC BY 4.0. Pictures: from Flickr, each under the "
    "licence that its owner chose."
)
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def about(year: int, karpathy: bool) -> dict[str, Any]:
    """What the manifest says."""
    name = f"MS-COCO {year}" + (", Karpathy's split" if karpathy else "")
    return {"name": name, "licence": "captions CC BY 4.0; pictures as on Flickr", "credit": CREDIT}


def year_of(root: Path, year: int | None) -> int:
    """2014 or 2017: the one asked for, or whose folders are there. Raises DataError when it is neither, or both."""
    if year:
        return year
    years = [found for found in (2014, 2017) if (root / f"train{found}").is_dir()]
    if len(years) == 2:
        raise DataError(f"{root} holds COCO 2014 and 2017: say which with --year")
    if not years:
        first_folder(root, ("train2014", "train2017"), LAYOUT)
    return years[0]


def coco_items(root: Path, year: int | None, karpathy: Path | None) -> tuple[list[Item], list[Problem]]:
    """The pictures with their captions, sorted by key: `train`, and val as `test`; with Karpathy's file train (with
    restval), val and test as it says.

    Raises: DataError when the layout is another one, or a file of captions cannot be read.
    """
    problems: list[Problem] = []
    if karpathy:
        items = list(_of_karpathy(root, karpathy, problems))
    else:
        year = year_of(root, year)
        items = [
            item
            for part, split in ((f"train{year}", "train"), (f"val{year}", "test"))
            for item in _of_captions(first_folder(root, (part,), LAYOUT), root, part, split, problems)
        ]
    return sorted(items, key=lambda item: item.key), problems


def _json(path: Path, *keys: str) -> list[list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. What is expected:\n{LAYOUT}") from error
    except OSError as error:
        raise DataError(f"cannot read the captions {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): was it downloaded to its end?") from error
    lists = [content.get(key) if isinstance(content, dict) else None for key in keys]
    for key, found in zip(keys, lists, strict=True):
        if not isinstance(found, list):
            raise DataError(f'{path} has no list "{key}": it is no file of COCO captions')
    return [[entry for entry in found if isinstance(entry, dict)] for found in lists if found is not None]


def _of_captions(folder: Path, root: Path, part: str, split: str, problems: list[Problem]) -> Iterator[Item]:
    path = root / "annotations" / f"captions_{part}.json"
    images, annotations = _json(path, "images", "annotations")
    names = {entry.get("id"): str(entry.get("file_name", "")) for entry in images}
    texts: dict[Any, list[str]] = {}
    for entry in annotations:
        if entry.get("image_id") not in names:
            problems.append(
                Problem(f"{path.name}: {entry.get('id')}", str(entry.get("image_id")), "caption is of no known picture")
            )
        else:
            texts.setdefault(entry["image_id"], []).append(str(entry.get("caption", "")))
    there = files_of(folder)
    for number, name in names.items():
        item = _item(folder, name, there, texts.get(number, []), f"{path.name}: {number}", problems, number)
        if item:
            item.split = split
            yield item
    for name in sorted(there - set(names.values())):
        problems.append(Problem("", f"{part}/{name}", f"picture is not in {path.name}"))


def _item(
    folder: Path, name: str, there: set[str], texts: list[str], where: str, problems: list[Problem], number: Any
) -> Item | None:
    if name not in there or "/" in name:
        problems.append(Problem(where, f"{folder.name}/{name}", "picture is missing"))
        return None
    key = name.rpartition(".")[0].replace(".", "_")
    return captioned(key, PictureFile(f"{folder}/{name}"), texts, where, problems, image_id=number)


def _of_karpathy(root: Path, path: Path, problems: list[Problem]) -> Iterator[Item]:
    (images,) = _json(path, "images")
    there: dict[str, set[str]] = {}
    for entry in images:
        folder, name = str(entry.get("filepath", "")), str(entry.get("filename", ""))
        if folder not in there:
            there[folder] = files_of(first_folder(root, (folder,), LAYOUT)) if folder.isalnum() else set()
        split = _SPLITS.get(str(entry.get("split")))
        where = f"{path.name}: {entry.get('cocoid')}"
        sentences = entry.get("sentences")
        if split is None or not isinstance(sentences, list):
            problems.append(
                Problem(where, name, f"split is {entry.get('split')!r}" if sentences else "has no captions")
            )
            continue
        texts = [str(one.get("raw", "")) for one in sentences if isinstance(one, dict)]
        item = _item(root / folder, name, there[folder], texts, where, problems, entry.get("cocoid"))
        if item:
            item.split = split
            yield item
