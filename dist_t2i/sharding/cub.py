"""CUB-200-2011 with the ten captions a picture of Reed et al.; the classes of `test` are not those of `train`.

Sources: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset"; Reed et al., "Learning Deep Representations of
Fine-grained Visual Descriptions" (2016) for captions and class lists. The field trains on 150 classes and tests on 50.
"""

from __future__ import annotations

from dist_t2i.sharding.layouts import ClassSet

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
