"""Scores of scenes where the detector is right: pictures are given by the attributes of rendered scenes."""

import pytest
import torch

from dist_t2i.data.scenes import attributes, same_caption, sample_scene
from dist_t2i.eval import metrics
from dist_t2i.eval.contents.scene_scores import NAMED, OPEN, Named, named_scores, open_scores, right
from dist_t2i.eval.judges.attributes import Shown
from dist_t2i.eval.judges.detector import COLORS, KINDS, OBJECTS, SHAPES, WIDTH

SCENES = [attributes(sample_scene(5, index)) for index in range(120)]
WEIGHTS = metrics.bootstrap_weights(range(len(SCENES)), 100)


def features(about):
    """What a detector without errors finds in a picture of a scene: [WIDTH]."""
    rows = [
        [1.0, item["x"], item["y"], item["radius"], COLORS.index(item["color"]), SHAPES.index(item["shape"])]
        for item in about["objects"]
    ]
    slots = torch.zeros(OBJECTS, 6)
    slots[: len(rows)] = torch.tensor(rows[::-1])  # in any order
    background = about["background"]
    return torch.cat([slots.flatten(), torch.tensor([KINDS.index(background["kind"]), background["hue"]])])


def pictures(seed, count):
    """`count` further pictures of each caption: [count, N, WIDTH]."""
    again = [
        [features(attributes(same_caption(about, seed, i * 1000 + row))) for row, about in enumerate(SCENES)]
        for i in range(count)
    ]
    return torch.stack([torch.stack(rows) for rows in again])


REAL, AGAIN = torch.stack([features(about) for about in SCENES]), pictures(1, 2)


def named(fake):
    scores = named_scores(fake, torch.cat([REAL[None], AGAIN]), SCENES, WEIGHTS, "scenes")
    return {score.key: score for score in scores}


def opened(fake):
    return {score.key: score for score in open_scores(fake, REAL, AGAIN, WEIGHTS, 20, "scenes")}


def test_real_pictures_reach_the_ceiling():
    found = named(pictures(2, 3))
    assert [key.replace("_", "-") for key in found] == list(NAMED)
    for score in found.values():
        assert score.value == score.low == score.high == 1 == score.ceiling["the real pictures"]


def test_pictures_of_other_captions_score_the_floor():
    for score in named(torch.stack([pictures(2, 1)[0].roll(by, 0) for by in (3, 5, 8, 11)])).values():
        if score.key != "relation_right":  # hardly any of these pictures shows both objects
            (floor,) = score.floor.values()
            assert score.low - 0.02 <= floor <= score.high + 0.02


def test_relations_at_random_are_right_in_one_of_four():
    """Two objects are right, and their positions are those of other captions."""
    two = [row for row, about in enumerate(SCENES) if about["relation"]]
    fake = pictures(2, 1)[0][two]
    moved = fake.clone().unflatten(0, (-1,))
    for slot in range(2):
        moved[:, slot * 6 + 1 : slot * 6 + 3] = fake[:, slot * 6 + 1 : slot * 6 + 3].roll(1, 0)
    shown = right(Shown.of(moved), Named.of([SCENES[row] for row in two]))
    hits, counted = shown["relation-right"]
    assert counted.all() and 0.1 < hits.double().mean() < 0.4
    assert torch.equal(shown["all-right"][0], hits)


def scene(*objects, relation=""):
    about = [{"shape": shape, "color": color, "x": x, "y": y, "radius": 0.15} for shape, color, x, y in objects]
    return {"objects": about, "relation": relation, "background": {"kind": "plain", "hue": 0.0}}


@pytest.mark.parametrize(
    ("shows", "wrong"),
    [
        ([("disc", "red", 0.3, 0.5), ("star", "blue", 0.7, 0.6)], set()),
        ([("disc", "red", 0.7, 0.5), ("star", "blue", 0.3, 0.5)], {"relation-right", "all-right"}),
        ([("disc", "red", 0.4, 0.2), ("star", "blue", 0.6, 0.8)], {"relation-right", "all-right"}),
        ([("disc", "blue", 0.3, 0.5), ("star", "red", 0.7, 0.5)], {"all-right"}),  # bound to the wrong objects
        ([("disc", "red", 0.3, 0.5), ("disc", "blue", 0.7, 0.5)], {"shape-right", "all-right"}),
        ([("disc", "red", 0.3, 0.5), ("star", "red", 0.7, 0.5)], {"color-right", "all-right"}),
        ([("disc", "red", 0.3, 0.5)], {"number-right", "color-right", "shape-right", "all-right"}),
        ([("disc", "red", 0.3, 0.5), ("star", "blue", 0.7, 0.5), ("star", "blue", 0.5, 0.9)],
         {"number-right", "color-right", "shape-right", "all-right"}),
    ],
)  # fmt: skip
def test_what_is_right_in_a_picture(shows, wrong):
    asked = Named.of([scene(("disc", "red", 0, 0), ("star", "blue", 0, 0), relation="left of")])
    found = right(Shown.of(features(scene(*shows))[None]), asked)
    assert {name for name, (hit, counted) in found.items() if counted and not hit} - {"all-right-two"} == wrong
    assert found["relation-right"][1].item() == (wrong <= {"relation-right", "all-right"} and wrong != {"all-right"})


def test_real_pictures_differ_as_real_pictures_do():
    found = opened(pictures(2, 4))
    assert [key.replace("_", "-") for key in found] == list(OPEN)
    assert found["hue_entropy"].value == pytest.approx(found["hue_entropy"].ceiling["the real pictures"], abs=0.03)
    assert found["hue_spread"].value == pytest.approx(1, abs=0.1)
    for key in ("background_distance", "size_distance", "position_distance"):
        (floor,) = found[key].floor.values()
        assert found[key].value == pytest.approx(floor, abs=0.05) and found[key].better == "lower"
    assert sum(found["background_distance"].parts.values()) == pytest.approx(1)


def test_one_picture_for_all_captions_is_found_out():
    found = opened(REAL[:1].expand(4, len(REAL), WIDTH))
    assert found["hue_entropy"].value == found["hue_spread"].value == 0
    for key in ("background_distance", "size_distance", "position_distance"):
        (ceiling,) = found[key].ceiling.values()
        assert found[key].value >= 0.9 * ceiling


def test_pictures_that_show_nothing():
    nothing = torch.zeros(2, len(REAL), WIDTH)
    assert opened(nothing)["size_distance"].value == opened(nothing)["position_distance"].value == 1
    relation = named(nothing)["relation_right"]
    assert (relation.value, relation.low, relation.high) == (0, 0, 1)
    assert relation.parts == {"share of pictures that show both": 0}
