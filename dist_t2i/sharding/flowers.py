"""Oxford-102 flowers with the ten captions a picture of Reed et al.; the classes of `test` are not those of `train`.

Sources: Nilsback & Zisserman, "Automated flower classification over a large number of classes" (2008); Reed et al.,
"Learning Deep Representations of Fine-grained Visual Descriptions" (2016) for captions and class lists. The field
trains on 82 classes and tests on 20.
"""

from __future__ import annotations

from dist_t2i.sharding.layouts import ClassSet

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
