"""Oxford-102 flowers with the ten captions a picture of Reed et al.; the classes of `test` are not those of `train`.

Sources: Nilsback & Zisserman, "Automated flower classification over a large number of classes" (2008); Reed et al.,
"Learning Deep Representations of Fine-grained Visual Descriptions" (2016) for captions and class lists. The field
trains on 82 classes and tests on 20.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.folder import Item, Problem
from dist_t2i.sharding.layouts import class_split, first_folder, text_items

LAYOUT = """  DIR/jpg/image_00001.jpg ... image_08189.jpg
      text_c10/class_00001/image_06734.txt ...   ten captions, one a line; the folder names the class
      trainvalclasses.txt, testclasses.txt       a class a line: class_00001 ...    (optional)
(102flowers.tgz, and the text release of Reed et al., cvpr2016_flowers; its folder may lie inside DIR as well. With only
trainclasses.txt and valclasses.txt, both are trained on. Without lists, every fifth class is held out, class_00005 ...
class_00100: 82 classes and 20, but not those that published numbers are about. imagelabels.mat is not needed.)"""
CREDIT = (
    "Oxford 102 flowers (Nilsback & Zisserman 2008); captions: Reed et al. 2016. The photographs are their owners'."
)


def about() -> dict[str, Any]:
    """What the manifest says."""
    return {"name": "Oxford-102 flowers", "licence": "unknown: research use", "credit": CREDIT}


def flowers_items(
    root: Path, texts: Path | None, train: Path | None, test: Path | None
) -> tuple[list[Item], list[Problem], str]:
    """The pictures with their captions, sorted by key; problems; and where the split comes from.

    Raises: DataError when the layout is another one, or the lists of classes do not fit it.
    """
    images = first_folder(root, ("jpg", "102flowers/jpg"), LAYOUT)
    texts = texts or first_folder(root, ("text_c10", "cvpr2016_flowers/text_c10"), LAYOUT)
    if not texts.is_dir():
        raise DataError(f"--texts {texts}: there is no such folder. What is expected:\n{LAYOUT}")
    classes = sorted(path.name for path in texts.iterdir() if path.is_dir() and path.name.startswith("class_"))
    if not classes:
        raise DataError(f"{texts} has no folders class_00001 ... What is expected:\n{LAYOUT}")
    split, source = class_split(classes, (root, texts.parent), train, test, lambda n: n % 5 == 0)
    problems: list[Problem] = []
    items = list(text_items(classes, texts, lambda name, stem: images / f"{stem}.jpg", split, problems))
    return sorted(items, key=lambda item: item.key), problems, source
