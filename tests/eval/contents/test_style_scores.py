"""Styles of pictures by the strength of their color, with real pictures of OpenMoji in both styles."""

import pytest
import torch

from dist_t2i.data.images import decode, square
from dist_t2i.eval import metrics
from dist_t2i.eval.contents.style_scores import colored_strength, style_of, style_scores
from dist_t2i.eval.judges.features import load_features

ABOUT = [{"style": style} for style in ("color", "black") * 20]
IDS = torch.arange(20).repeat_interleave(2)
REAL = torch.tensor([0.5, 0.0] * 20)[:, None]
WEIGHTS = metrics.bootstrap_weights(IDS.tolist(), 100)


def scores(fake):
    found = style_scores(fake.expand(-1, 40)[..., None], REAL, IDS, ABOUT, WEIGHTS, "styles")
    return {score.key: score for score in found}


def test_one_style_both_styles_and_mixtures():
    both, one, mixed = (torch.tensor(rows)[:, None] for rows in ([0.5, 0.0, 0.45, 0.02], [0.5] * 4, [0.25] * 4))
    found = scores(both)
    assert found["style_distance"].value == 0 and found["both_styles"].value == 1
    assert found["both_styles"].ceiling == {"styles are independent": 0.875}
    found = scores(one)
    assert found["style_distance"].value == 0.5 == found["style_distance"].ceiling["one style"]
    assert found["both_styles"].value == 0
    found = scores(mixed)
    assert (
        found["style_distance"].parts == {"color": 0, "black": 0, "neither": 1} and found["style_distance"].value == 1
    )


def test_captions_without_color_do_not_count():
    real = REAL.clone()
    real[:20] = 0.0
    fake = torch.cat([torch.zeros(2, 20), torch.tensor([[0.5], [0.0]]).expand(2, 20)], 1)[..., None]
    found = style_scores(fake, real, IDS, ABOUT, WEIGHTS, "styles")
    assert [score.value for score in found] == [0, 1]


@pytest.mark.slow
def test_real_pictures_have_their_styles():
    """Also by the colored picture of the caption in the other skin tone, which stands for another real picture."""
    pytest.importorskip("emoji")
    openmoji = pytest.importorskip("dist_t2i.sharding.sources.openmoji")
    items = [item for item in openmoji.openmoji_items(32, ("color", "black")) if item.split == "test-combinations"]
    network = load_features("styles", "cpu")
    strength = network(torch.stack([square(decode(item.picture.read()), 32) for item in items]))[:, 0]
    names = {item.captions[0]: number for number, item in enumerate(items)}
    style = torch.tensor([("color", "black").index(item.attributes["style"]) for item in items])

    def by(rename):
        ids = torch.tensor([names.get(rename(item.captions[0]), -1) for item in items])
        own = torch.tensor([names[item.captions[0]] for item in items])
        colored = colored_strength(strength, own, [item.attributes for item in items])
        known = ids >= 0
        return (style_of(strength[known], colored[ids[known]]) == style[known]).double().mean()

    def other_tone(caption):
        return (
            caption.replace("light skin", "dark skin") if "light skin" in caption else caption.replace("dark", "light")
        )

    assert len(items) == 480 and by(lambda caption: caption) == 1
    assert by(other_tone) >= 0.99
