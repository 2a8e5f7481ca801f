"""Diversity of planted generators: real pictures, one picture per caption, one of two styles."""

import pytest
import torch

from dist_t2i.data import scenes
from dist_t2i.eval import metrics
from dist_t2i.eval.measure import Features
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.references import noisy
from dist_t2i.eval.scoring import Case, diversity_scores
from judges import JUDGE

N = 60
SCENES = [scenes.attributes(scenes.sample_scene(9, index)) for index in range(N)]
CAPTIONS = tuple((f"caption {index}",) for index in range(N))


def pictures(seed):
    """A real picture of each caption, uint8 [N, 3, 32, 32]."""
    found = [scenes.render(scenes.same_caption(about, seed, row), 32) for row, about in enumerate(SCENES)]
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in found])


REAL = pictures(0)


def diversity(fake, real=REAL, captions=CAPTIONS, attributes=(), again=None):
    """The score of pictures [seeds][N, ...] generated for `captions`."""
    fakes = torch.stack([JUDGE(part) for part in fake])
    copies = {"real": JUDGE(real), "noisy": JUDGE(noisy(real))}
    weights = metrics.bootstrap_weights([row[0] for row in captions], 50)
    protocol = Protocol("test", seeds=tuple(range(len(fake))))
    (score,) = diversity_scores(
        Case("x", JUDGE, Features(fakes, copies, None, again), captions, protocol, weights, attributes)
    )
    return score


@pytest.fixture(scope="module")
def again():
    return torch.stack([JUDGE(pictures(seed)) for seed in (1, 2, 3)], 1)


def test_real_pictures_score_one_and_one_picture_per_caption_zero(again):
    score = diversity([pictures(seed) for seed in (4, 5, 6)], again=again)
    assert score.key == "diversity_x" and "of the same caption" in score.name
    assert score.low < 1 < score.high and score.value == pytest.approx(1, abs=0.1)
    (ceiling,) = score.ceiling.values()
    assert ceiling == pytest.approx(1, abs=0.05)
    same = diversity([REAL] * 3, again=again)
    assert same.value == pytest.approx(same.floor["one picture per caption"], abs=1e-6)


def test_noise_alone_scores_the_floor(again):
    score = diversity([REAL, noisy(REAL)], again=again)
    assert score.value == pytest.approx(score.floor["a real picture and its copy with noise"])


def test_the_pictures_of_a_set_are_the_reference_where_captions_repeat():
    captions = tuple((f"caption {index % (N // 2)}",) for index in range(N))
    halves = [torch.cat([pictures(seed)[: N // 2]] * 2) for seed in range(5)]
    real = torch.cat([pictures(7)[: N // 2], pictures(8)[: N // 2]])
    score = diversity(halves, real, captions)
    assert score.key == "diversity_x" and score.value == pytest.approx(1, abs=0.15)


def test_a_reference_of_different_captions_is_said():
    score = diversity([REAL.roll(by, 0) for by in range(1, 4)])
    assert score.key == "diversity_other_captions_x" and "no goal" in score.name
    assert score.value == pytest.approx(1, abs=0.1)


def test_styles_at_random_score_one():
    """A colored and a black picture of each caption are all its pictures; generated ones have either style by chance."""
    black = (REAL.float().mean(1, keepdim=True) > 128).byte().expand(-1, 3, -1, -1) * 255
    random = torch.rand(8, N, 1, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    fake = [torch.where(mask, REAL, black).repeat(2, 1, 1, 1) for mask in random]
    attributes = tuple({"style": style} for style in ("color",) * N + ("black",) * N)
    score = diversity(fake, torch.cat([REAL, black]), CAPTIONS * 2, attributes)
    assert score.key == "diversity_x" and score.value == pytest.approx(1, abs=0.1)
