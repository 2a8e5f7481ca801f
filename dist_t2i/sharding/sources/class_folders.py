"""Reads CUB-200-2011 and Oxford-102 flowers, which are sorted into classes, with the captions of Reed et al. (2016)."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import read_text_file
from dist_t2i.sharding.items import Gathered, Item, Problem, captioned
from dist_t2i.sharding.pictures import PictureFile
from dist_t2i.utils.text import nearest

TRAIN_LISTS, TEST_LIST = ("trainvalclasses.txt", "trainclasses.txt"), "testclasses.txt"


def first_folder(root: Path, names: Sequence[str], layout: str) -> Path:
    """The first folder in `names` that exists in `root`. Without such a folder, raises a DataError with `layout`."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    problem = f" has no folder {' or '.join(names)}" if root.is_dir() else ": this folder does not exist"
    raise DataError(f"{root}{problem}. Expected files:\n{layout}")


def files_of(folder: Path) -> set[str]:
    """All names in a folder. Listing a folder once is faster than looking up each file."""
    return set(os.listdir(folder))


def class_split(
    classes: Sequence[str], folders: Iterable[Path], train: Path | None, test: Path | None, hold_out_every: int
) -> tuple[dict[str, str], str]:
    """The split of each class (`train` or `test`), and the name of the files or the rule behind the splits.

    `train` and `test` are files that list the classes of the splits. If both are None, the lists of the text release
    are read from the first of `folders` that has one: `testclasses.txt` lists the test classes, and
    `trainvalclasses.txt` lists the training classes. If `trainvalclasses.txt` is missing, `trainclasses.txt` and
    `valclasses.txt` list the training classes. Without any list, each class whose number is a multiple of
    `hold_out_every` is a test class. Raises DataError if a list cannot be read, a list names an unknown class, or a
    class is in both splits or in neither split.
    """
    if train is None and test is None:
        lists = (TEST_LIST, *TRAIN_LISTS)
        folder = next((folder for folder in folders if any((folder / name).is_file() for name in lists)), None)
        if folder is None:
            numbers = {name: int("".join(filter(str.isdigit, name.partition(".")[0])) or 0) for name in classes}
            default = {name: "train" if number % hold_out_every else "test" for name, number in numbers.items()}
            return default, "the default rule"
        test = folder / TEST_LIST if (folder / TEST_LIST).is_file() else None
        train = next((folder / name for name in TRAIN_LISTS if (folder / name).is_file()), None)
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


def _class_list(path: Path, classes: Sequence[str]) -> list[str]:
    if path.suffix not in (".txt", ""):
        raise DataError(f"{path}: a list of classes must be a text file with one class per line; pickles are not read")
    try:
        names = [line.strip() for line in read_text_file(path)]
    except OSError as error:
        raise DataError(f"cannot read the list of classes {path}: {error.strerror}") from error
    known = set(classes)
    if unknown := next((name for name in names if name not in known), None):
        near = nearest(unknown, classes)
        hint = f"; did you mean {near}?" if near else ""
        raise DataError(f"{path} names the class {unknown[:100]!r}, but this class has no pictures{hint}")
    return names


@dataclass(frozen=True)
class ClassSet:
    """A data set in which each picture belongs to a class."""

    about: dict[str, Any]
    """Entries of the manifest: name, licence, credit."""
    layout: str
    """The expected files of the data set, as text for `--help` and error messages."""
    images: tuple[str, ...]
    texts: tuple[str, ...]
    """Possible folders of the pictures (`images`) and of the captions (`texts`). The first existing folder of each kind
    is used."""
    hold_out_every: int
    """Without lists of classes, each class whose number is a multiple of this value is in the split `test`."""
    nested: bool
    """Whether each class has its own folder of pictures; otherwise all pictures are in one folder."""

    def items(self, root: Path, texts: Path | None, train: Path | None, test: Path | None) -> Gathered:
        """The pictures with their captions, sorted by key. Prints the rule that determined the split.

        If `texts` (the folder of the captions) is None, the usual folders in `root` are tried. `train` and `test` are
        files that list classes (see `class_split`). Raises DataError if the files do not have the expected layout or
        the lists do not match the classes.
        """
        images = first_folder(root, self.images, self.layout)
        texts = texts or first_folder(root, self.texts, self.layout)
        if not texts.is_dir():
            raise DataError(f"--texts {texts}: this folder does not exist. Expected files:\n{self.layout}")
        parent, prefix = (images, "") if self.nested else (texts, "class_")
        classes = sorted(path.name for path in parent.iterdir() if path.is_dir() and path.name.startswith(prefix))
        if not classes:
            raise DataError(f"{parent} contains no class folder {prefix}... Expected files:\n{self.layout}")
        folders = (root, texts.parent, images.parent)
        split, rule = class_split(classes, folders, train, test, self.hold_out_every)
        print(f"classes are split by {rule}", file=sys.stderr)
        items: list[Item] = []
        problems: list[Problem] = []
        listing = functools.cache(files_of)
        for name in classes:
            folder = images / name if self.nested else images
            items += _class_items(texts / name, folder, listing(folder), split[name], problems)
        return sorted(items, key=lambda item: item.key), problems, self.about


def _class_items(texts: Path, images: Path, pictures: set[str], split: str, problems: list[Problem]) -> list[Item]:
    """The items of one class. Each TEXTS/NAME.txt contains the captions of IMAGES/NAME.jpg, one per line."""
    label = f"{texts.parent.name}/{texts.name}"
    if not texts.is_dir():
        problems.append(Problem(label, "", "class has no captions"))
        return []
    items = []
    for file in sorted(entry for entry in files_of(texts) if entry.endswith(".txt")):
        where, picture = f"{label}/{file}", f"{file[:-4]}.jpg"
        if picture not in pictures:
            problems.append(Problem(where, picture, "picture is missing"))
            continue
        try:
            captions = list(read_text_file(texts / file)) or [""]
        except OSError as error:
            problems.append(Problem(where, picture, f"captions are unreadable: {error.strerror}"))
            continue
        key = f"{texts.name}/{file[:-4]}".replace(".", "_")
        item = Item(key, PictureFile(str(images / picture)), captions, split, {"class": texts.name})
        items += captioned(item, where, problems)
    return items


CUB = ClassSet(
    about={
        "name": "CUB-200-2011",
        "licence": "non-commercial research and education",
        "credit": "Caltech-UCSD Birds-200-2011 (Wah et al. 2011); captions: Reed et al. 2016. For non-commercial "
        "research and education only; the photographs belong to their owners.",
    },
    layout="""  DIR/CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg ...    (or DIR/images/...)
      text_c10/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.txt ...   ten captions, one per line
      trainvalclasses.txt, testclasses.txt     one class per line: 001.Black_footed_Albatross ...    (optional)
(The files come from CUB_200_2011.tgz and from cvpr2016_cub, the folder of Reed et al., which may also be inside DIR.
Without trainvalclasses.txt, trainclasses.txt and valclasses.txt list the training classes. Without any list, every
fourth class (004 ... 200) is a test class. Published results use other splits. Pickled lists are not read.)""",
    images=("CUB_200_2011/images", "images"),
    texts=("text_c10", "cvpr2016_cub/text_c10", "text"),
    hold_out_every=4,
    nested=True,
)
FLOWERS = ClassSet(
    about={
        "name": "Oxford-102 flowers",
        "licence": "unknown: research use",
        "credit": "Oxford 102 flowers (Nilsback & Zisserman 2008); captions: Reed et al. 2016. The photographs "
        "belong to their owners.",
    },
    layout="""  DIR/jpg/image_00001.jpg ... image_08189.jpg
      text_c10/class_00001/image_06734.txt ...   ten captions, one per line; the folder names the class
      trainvalclasses.txt, testclasses.txt       one class per line: class_00001 ...    (optional)
(The files come from 102flowers.tgz and from cvpr2016_flowers, the folder of Reed et al., which may also be inside DIR.
Without trainvalclasses.txt, trainclasses.txt and valclasses.txt list the training classes. Without any list, every
fifth class (class_00005 ... class_00100) is a test class. Published results use other splits. The file imagelabels.mat
is not needed.)""",
    images=("jpg", "102flowers/jpg"),
    texts=("text_c10", "cvpr2016_flowers/text_c10"),
    hold_out_every=5,
    nested=False,
)
