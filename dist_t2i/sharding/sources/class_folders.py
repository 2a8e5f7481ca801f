"""What the data sets that come as folders share: their layout is checked, their classes are split, their texts read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import decode_text, read_text_file
from dist_t2i.sharding.items import Item, Problem, captioned
from dist_t2i.sharding.pictures import PictureFile
from dist_t2i.utils.text import nearest

TRAIN_LISTS, TEST_LIST = ("trainvalclasses.txt", "trainclasses.txt"), "testclasses.txt"


def first_folder(root: Path, names: Sequence[str], layout: str) -> Path:
    """The first of these folders that `root` has. Raises DataError that shows the layout."""
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder. What is expected:\n{layout}")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root} has no folder {' or '.join(names)}. What is expected:\n{layout}")


def files_of(folder: Path) -> set[str]:
    """The names in a folder, listed once instead of asked for one by one."""
    return {entry.name for entry in os.scandir(folder)}


def class_split(
    classes: Sequence[str],
    folders: Iterable[Path],
    train: Path | None,
    test: Path | None,
    default: Callable[[int], bool],
) -> tuple[dict[str, str], str]:
    """Class -> `train` or `test`, and where that comes from.

    The lists of the text release are taken when they lie in one of `folders` and none is named: `testclasses.txt`
    is held out, `trainvalclasses.txt` trained on, or in its absence `trainclasses.txt` and `valclasses.txt`. Without
    any list, `default` says of a class's number whether it is held out.

    Raises: DataError when a list cannot be read, names a class twice or one that is not there, or leaves one out.
    """
    if train is None and test is None:
        lists = (TEST_LIST, *TRAIN_LISTS)
        found = next((folder for folder in folders if any((folder / name).is_file() for name in lists)), None)
        if found is None:
            return {name: "test" if default(_number(name)) else "train" for name in classes}, "the default rule"
        test = found / TEST_LIST if (found / TEST_LIST).is_file() else None
        train = next((found / name for name in TRAIN_LISTS if (found / name).is_file()), None)
    tested = _class_list(test, classes) if test else []
    trained = _class_list(train, classes) if train else [name for name in classes if name not in set(tested)]
    if train and train.name == "trainclasses.txt" and (extra := train.with_name("valclasses.txt")).is_file():
        trained += _class_list(extra, classes)
    if not test:
        tested = [name for name in classes if name not in set(trained)]
    if both := sorted(set(trained) & set(tested)):
        raise DataError(f"{train} and {test} both name {', '.join(both[:5])}: no class may be in two splits")
    if neither := [name for name in classes if name not in {*trained, *tested}]:
        raise DataError(f"neither {train} nor {test} names {', '.join(neither[:5])} ({len(neither)} classes)")
    splits = dict.fromkeys(trained, "train") | dict.fromkeys(tested, "test")
    return splits, f"{train or 'the rest'} and {test or 'the rest'}"


def _number(name: str) -> int:
    """3 of `003.Sooty_Albatross` and of `class_00003`."""
    digits = "".join(char for char in name.partition(".")[0] if char.isdigit())
    return int(digits or 0)


def _class_list(path: Path, classes: Sequence[str]) -> list[str]:
    if path.suffix not in (".txt", ""):
        raise DataError(f"{path}: a list of classes must be a text file with a class a line (pickles are not read)")
    try:
        named = [line.strip() for line in decode_text(path.read_bytes()).splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read the list of classes {path}: {error.strerror}") from error
    known = set(classes)
    for name in named:
        if name not in known:
            near = nearest(name, classes)
            hint = f"; did you mean {near}?" if near else ""
            raise DataError(f"{path} names the class {name[:100]!r}, of which there are no pictures{hint}")
    return named


@dataclass(frozen=True)
class ClassSet:
    """A set whose pictures are of classes, with the texts of Reed et al. (2016); what tells one such set from another."""

    about: dict[str, Any]
    """What the manifest says: name, licence, credit."""
    layout: str
    """The folders as people have them, shown when they are not there."""
    images: tuple[str, ...]
    """Where the pictures may lie in the set's folder; the first that is there counts."""
    texts: tuple[str, ...]
    """Where the captions may lie."""
    hold_out_every: int
    """Without lists of classes, those whose number this divides are the split `test`."""
    nested: bool
    """Whether the pictures of a class have a folder of their own, as its texts always have."""

    def items(
        self, root: Path, texts: Path | None, train: Path | None, test: Path | None
    ) -> tuple[list[Item], list[Problem], str]:
        """The pictures with their captions, sorted by key; problems; and where the split comes from.

        Args:
            texts: the folder of the captions, if it is not one of those in `root`.
            train, test: lists of classes; see `class_split`.

        Raises: DataError when the layout is another one, or the lists of classes do not fit it.
        """
        images = first_folder(root, self.images, self.layout)
        texts = texts or first_folder(root, self.texts, self.layout)
        if not texts.is_dir():
            raise DataError(f"--texts {texts}: there is no such folder. What is expected:\n{self.layout}")
        classes = self._classes(images, texts)
        folders = (root, texts.parent, images.parent)
        split, source = class_split(classes, folders, train, test, lambda number: number % self.hold_out_every == 0)
        problems: list[Problem] = []

        def picture_of(name: str, stem: str) -> Path:
            return (images / name if self.nested else images) / f"{stem}.jpg"

        items = list(_text_items(classes, texts, picture_of, split, problems))
        return sorted(items, key=lambda item: item.key), problems, source

    def _classes(self, images: Path, texts: Path) -> list[str]:
        if self.nested:
            return sorted(path.name for path in images.iterdir() if path.is_dir())
        classes = sorted(path.name for path in texts.iterdir() if path.is_dir() and path.name.startswith("class_"))
        if not classes:
            raise DataError(f"{texts} has no folders class_00001 ... What is expected:\n{self.layout}")
        return classes


def _text_items(
    classes: Iterable[str],
    texts: Path,
    picture_of: Callable[[str, str], Path],
    split: dict[str, str],
    problems: list[Problem],
) -> Iterator[Item]:
    """The pictures that TEXTS/CLASS/NAME.txt describes, a caption a line; each class's name goes along."""
    known: dict[Path, set[str]] = {}
    for name in classes:
        folder = texts / name
        if not folder.is_dir():
            problems.append(Problem(f"{texts.name}/{name}", "", "class has no captions"))
            continue
        for file in sorted(entry for entry in files_of(folder) if entry.endswith(".txt")):
            path = picture_of(name, file[:-4])
            where = f"{texts.name}/{name}/{file}"
            if path.parent not in known:
                known[path.parent] = files_of(path.parent) if path.parent.is_dir() else set()
            if path.name not in known[path.parent]:
                problems.append(Problem(where, path.name, "picture is missing"))
                continue
            try:
                said = read_text_file(folder / file)
            except OSError as error:
                problems.append(Problem(where, path.name, f"captions are unreadable: {error.strerror}"))
                continue
            key = f"{name}/{file[:-4]}".replace(".", "_")
            item = captioned(key, PictureFile(str(path)), said or ("",), where, problems, **{"class": name})
            if item:
                item.split = split[name]
                yield item


_LAYOUT = """  DIR/CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg ...    (or DIR/images/...)
      text_c10/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.txt ...   ten captions, one a line
      trainvalclasses.txt, testclasses.txt     a class a line: 001.Black_footed_Albatross ...    (optional)
(CUB_200_2011.tgz, and the text release of Reed et al., cvpr2016_cub; its folder may lie inside DIR as well. With only
trainclasses.txt and valclasses.txt, both are trained on. Without lists, every fourth class is held out, 004, 008 ...
200: 150 classes and 50, but not those that published numbers are about. Pickled lists are not read.)"""
_CREDIT = (
    "Caltech-UCSD Birds-200-2011 (Wah et al. 2011); captions: Reed et al. 2016. For non-commercial research and "
    "education only; the photographs are their owners'."
)
CUB = ClassSet(
    about={"name": "CUB-200-2011", "licence": "non-commercial research and education", "credit": _CREDIT},
    layout=_LAYOUT,
    images=("CUB_200_2011/images", "images"),
    texts=("text_c10", "cvpr2016_cub/text_c10", "text"),
    hold_out_every=4,
    nested=True,
)


_LAYOUT = """  DIR/jpg/image_00001.jpg ... image_08189.jpg
      text_c10/class_00001/image_06734.txt ...   ten captions, one a line; the folder names the class
      trainvalclasses.txt, testclasses.txt       a class a line: class_00001 ...    (optional)
(102flowers.tgz, and the text release of Reed et al., cvpr2016_flowers; its folder may lie inside DIR as well. With only
trainclasses.txt and valclasses.txt, both are trained on. Without lists, every fifth class is held out, class_00005 ...
class_00100: 82 classes and 20, but not those that published numbers are about. imagelabels.mat is not needed.)"""
_CREDIT = (
    "Oxford 102 flowers (Nilsback & Zisserman 2008); captions: Reed et al. 2016. The photographs are their owners'."
)
FLOWERS = ClassSet(
    about={"name": "Oxford-102 flowers", "licence": "unknown: research use", "credit": _CREDIT},
    layout=_LAYOUT,
    images=("jpg", "102flowers/jpg"),
    texts=("text_c10", "cvpr2016_flowers/text_c10"),
    hold_out_every=5,
    nested=False,
)
