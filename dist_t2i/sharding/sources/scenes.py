"""The scenes of dist_t2i/data/scenes.py as a captioned set."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from dist_t2i.data.scenes import VERSION, attributes, captions, render, sample_scene, split_of
from dist_t2i.sharding.items import Item
from dist_t2i.sharding.pictures import Picture

ABOUT = {"name": "scenes", "licence": "CC0 1.0", "credit": "Rendered by dist_t2i (`python tools/shard.py scenes`)."}


@dataclass(frozen=True, slots=True)
class ScenePicture(Picture):
    """Scene `index` of the sequence `seed`. `read` renders the scene at `size` x `size` pixels."""

    seed: int
    index: int
    size: int

    def stat(self) -> tuple[int, str]:
        return 0, f"scene {VERSION} {self.seed} {self.index} {self.size}"

    def read(self) -> bytes:
        out = io.BytesIO()
        Image.fromarray(render(sample_scene(self.seed, self.index), self.size)).save(out, "PNG")
        return out.getvalue()


def scene_items(count: int, size: int, seed: int) -> list[Item]:
    """The first `count` scenes of the sequence `seed`. A scene does not depend on `count`."""
    items = []
    for index in range(count):
        scene = sample_scene(seed, index)
        picture = ScenePicture(seed, index, size)
        items.append(Item(f"{index:08d}", picture, captions(scene), split_of(scene), attributes(scene)))
    return items
