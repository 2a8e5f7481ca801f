"""Scenes: what their pictures show is what their captions and attributes say, and nothing held out is trained on."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy
import pytest

from dist_t2i.data.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    OPPOSITE,
    SYMMETRY,
    Background,
    Light,
    Scene,
    SceneObject,
    attributes,
    captions,
    combination,
    render,
    sample_scene,
    split_of,
)

SCENES = [sample_scene(0, index) for index in range(4000)]
PAIRS = [scene for scene in SCENES if len(scene.objects) == 2]
PLAIN = Background("plain", 0.1, 0.8, 0.0, 0.3, 0.0)


def single(shape: str, color: str = "blue", angle: float = 0.0, strength: float = 0.0) -> Scene:
    """One object in the middle. With `strength` 0, it has no shadow and no shading."""
    return Scene((SceneObject(color, shape, 0.5, 0.5, 0.25, angle, 0.0),), "", PLAIN, Light(30.0, strength))


def test_a_scene_never_changes():
    assert attributes(sample_scene(0, 1)) == {
        "number": 2,
        "objects": [
            {"color": "cyan", "shape": "heart", "x": 0.3533, "y": 0.819, "radius": 0.1559}
            | {"angle": 259.6148, "shade": -0.8428},
            {"color": "purple", "shape": "triangle", "x": 0.6561, "y": 0.1635, "radius": 0.1311}
            | {"angle": 87.402, "shade": -0.3075},
        ],
        "relation": "below",
        "background": {"kind": "stripes", "hue": 0.6937, "lightness": 0.1965}
        | {"angle": 197.878, "period": 0.2625, "phase": 0.3004},
        "light": {"angle": 355.3085, "strength": 0.548},
    }
    assert sample_scene(1, 1) != sample_scene(0, 1) == sample_scene(0, 1)
    means = render(sample_scene(0, 1), 32).mean(axis=(0, 1))
    assert means == pytest.approx([39.35, 41.04, 77.13], abs=0.1)


def test_every_value_of_an_attribute_occurs_equally_often():
    def shares(values) -> list[float]:
        counts = Counter(values)
        return [count / counts.total() for count in counts.values()]

    objects = [item for scene in SCENES for item in scene.objects]
    for number, values in (
        (2, [len(scene.objects) for scene in SCENES]),
        (4, [scene.relation for scene in PAIRS]),
        (len(BACKGROUNDS), [scene.background.kind for scene in SCENES]),
        (8, [item.color for item in objects]),
        (8, [item.shape for item in objects]),
        (10, [int(10 * scene.background.hue) for scene in SCENES]),
    ):
        assert shares(values) == pytest.approx([1 / number] * number, abs=0.03)


def test_objects_are_fully_visible_and_lie_as_the_relation_says():
    across = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
    for scene in SCENES:
        largest = 0.30 if len(scene.objects) == 1 else 0.20
        for item in scene.objects:
            assert 0.13 <= item.radius <= largest
            assert item.radius < min(item.x, item.y, 1 - item.x, 1 - item.y)
    for scene in PAIRS:
        first, second = scene.objects
        right, down = second.x - first.x, second.y - first.y
        x, y = across[scene.relation]
        along, sideways = x * right + y * down, abs(y * right + x * down)
        assert along > max(first.radius + second.radius, 1.99 * sideways), scene
        assert (first.color, first.shape) != (second.color, second.shape)


def test_captions_say_what_the_attributes_say():
    long = {"to the left of": "left of", "to the right of": "right of"}
    for scene in SCENES:
        texts = captions(scene)
        assert len(set(texts)) == len(texts) >= 4
        for text in texts:
            words = Counter(text.replace(",", "").replace(":", "").split())
            for kind, values in (("color", COLORS), ("shape", SYMMETRY)):
                said = {value for value in values if words[value]}
                assert said == {getattr(item, kind) for item in scene.objects}, text
    for scene in PAIRS:
        first, second = (f"{item.color} {item.shape}" for item in scene.objects)
        for text in captions(scene)[:4]:
            for phrase, short in long.items():
                text = text.replace(phrase, short)
            relation = next(relation for relation in OPPOSITE if f" {relation} " in text)
            straight = text.index(first) < text.index(second)
            assert relation == (scene.relation if straight else OPPOSITE[scene.relation]), text
    assert "an orange" in " ".join(captions(next(s for s in SCENES if s.objects[0].color == "orange")))


def test_training_has_every_word_but_no_held_out_combination():
    by_split = {split: [s for s in SCENES if split_of(s) == split] for split in ("train", "test-combinations")}
    assert sum(map(len, by_split.values())) == len(SCENES)
    trained = {combination(scene) for scene in by_split["train"]}
    assert trained.isdisjoint(combination(scene) for scene in by_split["test-combinations"])
    objects = [item for scene in by_split["train"] for item in scene.objects]
    assert HELD_OUT_PAIRS.isdisjoint(f"{item.color} {item.shape}" for item in objects)
    assert {item.color for item in objects} == set(COLORS) and {item.shape for item in objects} == set(SYMMETRY)
    assert {scene.relation for scene in by_split["train"]} == {"", *OPPOSITE}
    assert len(HELD_OUT_PAIRS) == 8
    held_out = by_split["test-combinations"]
    assert len({text for scene in held_out for text in captions(scene)}) >= 300
    new = [s for s in held_out if HELD_OUT_PAIRS.isdisjoint(f"{item.color} {item.shape}" for item in s.objects)]
    assert new and all(scene.relation for scene in new), "only a combination of two known pairs can be new"


def test_the_split_does_not_depend_on_which_object_comes_first():
    for scene in PAIRS:
        turned = replace(scene, objects=scene.objects[::-1], relation=OPPOSITE[scene.relation])
        assert combination(turned) == combination(scene) and split_of(turned) == split_of(scene)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", SYMMETRY)
def test_a_shape_fills_the_circle_of_its_radius_and_looks_the_same_after_its_symmetry(shape: str, size: int):
    picture = render(single(shape), size).astype(int)
    assert picture.shape == (size, size, 3)
    rows, columns = numpy.nonzero(abs(picture - picture[0, 0]).sum(axis=-1) > 30)
    farthest = max(math.hypot(y + 0.5 - size / 2, x + 0.5 - size / 2) for y, x in zip(rows, columns, strict=True))
    assert 0.25 * size - 1.5 < farthest < 0.25 * size + 1
    turned = render(single(shape, angle=SYMMETRY[shape]), size)
    assert abs(turned - picture).max() <= 1
    if SYMMETRY[shape]:
        assert abs(render(single(shape, angle=SYMMETRY[shape] / 2), size) - picture).max() > 50


@pytest.mark.parametrize("scene", PAIRS[:50])
def test_an_object_has_its_color(scene: Scene):
    """In the mean over the disc or the square, whatever the light and the background are."""
    shown = replace(scene, objects=tuple(replace(item, shape="disc", shade=0.0) for item in scene.objects))
    picture = render(shown, 64) / 255
    middles = (numpy.arange(64) + 0.5) / 64
    for item in scene.objects:
        inside = numpy.hypot(middles[None] - item.x, middles[:, None] - item.y) < 0.8 * item.radius
        mean = picture[inside].mean(axis=0)
        assert min(COLORS, key=lambda color: numpy.abs(COLORS[color] - mean).sum()) == item.color


def test_backgrounds_light_and_hue_are_visible():
    scene = single("star", strength=1.0)
    pictures = [render(replace(scene, background=replace(PLAIN, kind=kind)), 32).astype(int) for kind in BACKGROUNDS]
    pictures.append(render(replace(scene, background=replace(PLAIN, hue=0.6)), 32).astype(int))
    pictures.append(render(replace(scene, light=Light(210.0, 1.0)), 32).astype(int))
    for number, picture in enumerate(pictures):
        assert all((abs(picture - other).max(axis=-1) > 20).mean() > 0.05 for other in pictures[:number])


def test_attributes_are_json_and_complete():
    for scene in SCENES[:20]:
        read = json.loads(json.dumps(attributes(scene)))
        objects = tuple(SceneObject(**item) for item in read["objects"])
        assert Scene(objects, read["relation"], Background(**read["background"]), Light(**read["light"])) == scene
