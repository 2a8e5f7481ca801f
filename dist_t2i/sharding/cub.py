"""CUB-200-2011 with the ten captions a picture of Reed et al.; the classes of `test` are not those of `train`.

Sources: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset"; Reed et al., "Learning Deep Representations of
Fine-grained Visual Descriptions" (2016) for captions and class lists. The field trains on 150 classes and tests on 50.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.folder import Item, Problem
from dist_t2i.sharding.layouts import class_split, first_folder, text_items

LAYOUT = """  DIR/CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg ...    (or DIR/images/...)
      text_c10/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.txt ...   ten captions, one a line
      trainvalclasses.txt, testclasses.txt     a class a line: 001.Black_footed_Albatross ...    (optional)
(CUB_200_2011.tgz, and the text release of Reed et al., cvpr2016_cub; its folder may lie inside DIR as well. With only
trainclasses.txt and valclasses.txt, both are trained on. Without lists, every fourth class is held out, 004, 008 ...
200: 150 classes and 50, but not those that published numbers are about. Pickled lists are not read.)"""
CREDIT = (
    "Caltech-UCSD Birds-200-2011 (Wah et al. 2011); captions: Reed et al. 2016. For non-commercial research and "
    "education only; the photographs are their owners'."
)


def about() -> dict[str, Any]:
    """What the manifest says."""
    return {"name": "CUB-200-2011", "licence": "non-commercial research and education", "credit": CREDIT}


def cub_items(
    root: Path, texts: Path | None, train: Path | None, test: Path | None
) -> tuple[list[Item], list[Problem], str]:
    """The pictures with their captions, sorted by key; problems; and where the split comes from.

    Raises: DataError when the layout is another one, or the lists of classes do not fit it.
    """
    images = first_folder(root, ("CUB_200_2011/images", "images"), LAYOUT)
    texts = texts or first_folder(root, ("text_c10", "cvpr2016_cub/text_c10", "text"), LAYOUT)
    if not texts.is_dir():
        raise DataError(f"--texts {texts}: there is no such folder. What is expected:\n{LAYOUT}")
    classes = sorted(path.name for path in images.iterdir() if path.is_dir())
    split, source = class_split(classes, (root, texts.parent, images.parent), train, test, lambda n: n % 4 == 0)
    problems: list[Problem] = []

    def picture_of(name: str, stem: str) -> Path:
        return images / name / f"{stem}.jpg"

    items = list(text_items(classes, texts, picture_of, split, problems))
    return sorted(items, key=lambda item: item.key), problems, source
