"""MS-COCO 2014 or 2017 as distributed; with Karpathy's split if its file is named.

References: Lin et al., "Microsoft COCO: Common Objects in Context" (2014) and Chen et al., "Microsoft COCO Captions"
(2015) for the files; Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments" (2015) for the split, whose `restval` is
commonly used for training.
"""

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
(train2014.zip, val2014.zip and annotations_trainval2014.zip, unpacked in one folder; likewise for 2017)"""
CREDIT = (
    "MS-COCO (Lin et al. 2014, https://cocodataset.org). Captions: CC BY 4.0. Pictures: from Flickr, each under the "
    "licence that its owner chose."
)
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def coco_items(root: Path, year: int | None, karpathy: Path | None) -> Gathered:
    """The pictures with their captions, sorted by key.

    The splits are `train`, and val as `test`; with Karpathy's file its train (with restval), val and test.

    Args:
        year: 2014 or 2017; None if `root` holds one of them.

    Raises: DataError when the layout is another one, or a caption file cannot be read.
    """
    problems: list[Problem] = []
    year = 2014 if karpathy else year or _year_of(root)
    if karpathy:
        items = list(_of_karpathy(root, karpathy, problems))
    else:
        items = [
            item
            for part, split in ((f"train{year}", "train"), (f"val{year}", "test"))
            for item in _of_captions(first_folder(root, (part,), LAYOUT), root, part, split, problems)
        ]
    name = f"MS-COCO {year}" + (", Karpathy's split" if karpathy else "")
    about = {"name": name, "licence": "captions CC BY 4.0; pictures as on Flickr", "credit": CREDIT}
    return sorted(items, key=lambda item: item.key), problems, about


def _year_of(root: Path) -> int:
    years = [year for year in (2014, 2017) if (root / f"train{year}").is_dir()]
    if len(years) == 2:
        raise DataError(f"{root} holds COCO 2014 and 2017: say which with --year")
    if not years:
        first_folder(root, ("train2014", "train2017"), LAYOUT)
    return years[0]


def _read_lists(path: Path, *keys: str) -> list[list[dict[str, Any]]]:
    """The objects in each of these lists of a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Expected files:\n{LAYOUT}") from error
    except OSError as error:
        raise DataError(f"cannot read the captions {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): is the download incomplete?") from error
    lists = []
    for key in keys:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f'{path} has no list "{key}": it is not a file of COCO captions')
        lists.append([entry for entry in entries if isinstance(entry, dict)])
    return lists


def _of_captions(folder: Path, root: Path, part: str, split: str, problems: list[Problem]) -> Iterator[Item]:
    path = root / "annotations" / f"captions_{part}.json"
    images, annotations = _read_lists(path, "images", "annotations")
    names = {entry.get("id"): str(entry.get("file_name", "")) for entry in images}
    texts: dict[Any, list[str]] = {}
    for entry in annotations:
        if entry.get("image_id") in names:
            texts.setdefault(entry["image_id"], []).append(str(entry.get("caption", "")))
        else:
            where, image = f"{path.name}: {entry.get('id')}", str(entry.get("image_id"))
            problems.append(Problem(where, image, "caption is of no known picture"))
    files = files_of(folder)
    for number, name in names.items():
        where = f"{path.name}: {number}"
        yield from _item(folder, name, files, texts.get(number, []), where, problems, number, split)
    for name in sorted(files - set(names.values())):
        problems.append(Problem("", f"{part}/{name}", f"picture is not in {path.name}"))


def _item(
    folder: Path,
    name: str,
    files: set[str],
    texts: list[str],
    where: str,
    problems: list[Problem],
    image_id: Any,
    split: str,
) -> Iterator[Item]:
    """The item of a picture, or a line in `problems`."""
    if name not in files or "/" in name:
        problems.append(Problem(where, f"{folder.name}/{name}", "picture is missing"))
        return
    key = name.rpartition(".")[0].replace(".", "_")
    if item := captioned(key, PictureFile(f"{folder}/{name}"), texts, where, problems, image_id=image_id):
        item.split = split
        yield item


def _of_karpathy(root: Path, path: Path, problems: list[Problem]) -> Iterator[Item]:
    (images,) = _read_lists(path, "images")
    files: dict[str, set[str]] = {}
    for entry in images:
        folder, name = str(entry.get("filepath", "")), str(entry.get("filename", ""))
        if folder not in files:
            files[folder] = files_of(first_folder(root, (folder,), LAYOUT)) if folder.isalnum() else set()
        split = _SPLITS.get(str(entry.get("split")))
        where, image_id = f"{path.name}: {entry.get('cocoid')}", entry.get("cocoid")
        sentences = entry.get("sentences")
        if split is None or not isinstance(sentences, list):
            reason = f"split is {entry.get('split')!r}" if sentences else "has no captions"
            problems.append(Problem(where, name, reason))
            continue
        texts = [str(sentence.get("raw", "")) for sentence in sentences if isinstance(sentence, dict)]
        yield from _item(root / folder, name, files[folder], texts, where, problems, image_id, split)
