"""Scenes as the items of a set."""

import io

import numpy
from PIL import Image

from dist_t2i.data.scenes import render, sample_scene
from dist_t2i.sharding.sources.scenes import scene_items


def test_more_scenes_begin_with_the_same_scenes():
    few, many = scene_items(20, 32, 0), scene_items(60, 32, 0)
    assert many[:20] == few
    assert len({item.key for item in many}) == 60
    assert {item.split for item in many} == {"train", "test-combinations"}


def test_a_picture_is_rendered_when_it_is_read_and_no_pixel_is_lost():
    item = scene_items(8, 48, seed=3)[7]
    pixels = numpy.asarray(Image.open(io.BytesIO(item.picture.read())))
    assert (pixels == render(sample_scene(3, 7), 48)).all()
    stamps = {scene_items(8, size, seed)[7].picture.stat() for size, seed in ((48, 3), (32, 3), (48, 4))}
    assert len(stamps) == 3, "a set of other pictures would be kept as intact"
