"""The split of OpenMoji: the held-out names, and that none of their pictures is in the training split."""

import hashlib
import io
from collections import Counter, defaultdict
from dataclasses import replace

import numpy
import pytest
from PIL import Image

from dist_t2i.data.tokenizer import words
from dist_t2i.sharding.pictures import render
from dist_t2i.sharding.sources.openmoji import NOT_NOUNS, TWINS, openmoji_entries, openmoji_items

pytest.importorskip("emoji")
pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def by_split():
    found = defaultdict(list)
    for entry in openmoji_entries():
        found[entry.split].append(entry)
    return found


@pytest.fixture(scope="module")
def train_words(by_split):
    return {word for entry in by_split["train"] for caption in entry.captions for word in words(caption)}


def test_counts_and_keys():
    entries = openmoji_entries()
    assert len(entries) == 3953
    assert Counter(entry.split for entry in entries) == {"train": 3604, "test-combinations": 240, "test-nouns": 109}
    assert len({entry.key for entry in entries}) == len(entries)
    assert all("." not in entry.key for entry in entries), "a WebDataset key ends at the first dot"


def test_every_word_of_a_held_out_combination_is_trained_on(by_split, train_words):
    for entry in by_split["test-combinations"]:
        assert train_words.issuperset(words(entry.captions[0])), entry


def test_held_out_combinations_come_in_light_and_dark_pairs_and_leave_the_other_tones(by_split):
    tones = defaultdict(set)
    for entry in by_split["test-combinations"]:
        tones[entry.role].add(entry.tone)
    assert all(pair == {"light", "dark"} for pair in tones.values())
    trained = defaultdict(set)
    for entry in by_split["train"]:
        trained[entry.role].add(entry.tone)
    assert all(trained[role] >= {"medium-light", "medium", "medium-dark"} for role in tones)


def test_a_held_out_noun_is_never_said_in_training(by_split, train_words):
    for entry in by_split["test-nouns"]:
        assert not train_words.issuperset(words(entry.captions[0])), entry
        assert "skin tone" not in entry.captions[0]
    assert not train_words.isdisjoint(NOT_NOUNS)


def test_aliases_of_people_say_the_tone():
    for entry in openmoji_entries():
        if entry.tone:
            assert all(f"{entry.tone} skin tone" in caption for caption in entry.captions), entry
        assert len({caption.lower() for caption in entry.captions}) == len(entry.captions)


def test_captions_are_plain():
    for entry in openmoji_entries():
        for caption in entry.captions:
            assert caption == " ".join(caption.split()) and "_" not in caption and ":" not in caption.strip(":")


def test_render():
    entry = next(entry for entry in openmoji_entries() if entry.captions[0] == "red heart")
    image = Image.open(io.BytesIO(render(entry.svg, 48)))
    assert image.size == (48, 48) and image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = image.getpixel((24, 24))
    assert red > 200 and green < 120 and blue < 120
    assert render(entry.svg, 48) == render(entry.svg, 48)


def test_two_styles_of_a_picture_share_captions_and_split():
    plain, both = openmoji_items(32), openmoji_items(32, ("color", "black"))
    color, black = both[::2], both[1::2]
    assert [replace(item, attributes={**item.attributes, "style": "color"}) for item in plain] == color
    assert len({item.key for item in both}) == 2 * 3953
    for one, two in zip(color, black, strict=True):
        assert two.key == f"{one.key}_black" and (two.captions, two.split) == (one.captions, one.split)
        assert two.attributes == {**one.attributes, "style": "black"}
    heart = next(item for item in black if item.captions[0] == "red heart")
    pixels = numpy.asarray(Image.open(io.BytesIO(heart.picture.read()))).astype(int)
    assert (pixels.max(axis=-1) == pixels.min(axis=-1)).all() and pixels.min() < 50
    assert (pixels[16, 16] == 255).all(), "only the outline is black"


@pytest.mark.slow
def test_no_picture_of_a_test_split_is_in_another_split_and_twins_are_all_known():
    """Renders all pictures, because two names may have the same drawing."""
    places = defaultdict(list)
    for entry in openmoji_entries():
        places[hashlib.sha256(render(entry.svg, 64)).digest()].append(entry)
    for entries in places.values():
        assert len({entry.split for entry in entries}) == 1, entries
        roles = {entry.role for entry in entries if entry.tone}
        assert len(roles) < 2 or roles <= TWINS, roles
        assert len({entry.tone for entry in entries}) == 1, "a caption names a tone that its picture does not show"
