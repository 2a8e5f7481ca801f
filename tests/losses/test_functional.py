"""Losses compared with values computed by hand, or by autograd in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dist_t2i.losses import functional as losses
from dist_t2i.models.config import DiscriminatorConfig
from dist_t2i.models.discriminator import Discriminator


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double), dim=-1)


# Hinge


def test_hinge_d_by_hand():
    real, fake, wrong = vector(2.0, 0.5), vector(-3.0, 0.0), vector(1.0, -1.0)
    # real: (0 + .5)/2 = .25; fake: (0 + 1)/2 = .5; wrong: (2 + 0)/2 = 1
    assert losses.hinge_d(real, fake).item() == pytest.approx(0.75)
    assert losses.hinge_d(real, fake, wrong, 0.5).item() == pytest.approx(0.25 + 0.25 + 0.5)
    assert losses.hinge_d(real, fake, wrong, 0.0).item() == pytest.approx(0.75)
    assert losses.hinge_d(real, fake, wrong, 1.0).item() == pytest.approx(1.25)


def test_hinge_g_by_hand():
    assert losses.hinge_g(vector(1.0, -4.0)).item() == pytest.approx(1.5)


def test_losses_are_fp32_whatever_comes_in():
    half = torch.ones(4, dtype=torch.bfloat16)
    pairs = units(4, 3).bfloat16()
    values = [
        losses.hinge_d(half, half, half),
        losses.hinge_g(half),
        losses.info_nce(pairs, pairs, 0.1),
        losses.region_info_nce(units(4, 2, 3).half(), pairs.half(), 0.1),
        losses.word_info_nce(units(4, 2, 3).half(), units(4, 2, 3).bfloat16(), torch.ones(4, 2).bool(), 0.1),
        losses.kl_condition(half, half),
        losses.fd_r1(half, half, 0.1),
    ]
    assert all(value.dtype == torch.float32 and value.shape == () for value in values)


# InfoNCE


def test_info_nce_of_two_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    # logits / t with t = .5: [[1.2, 1.6], [1.6, 1.2]]; each direction: log(1 + e^.4)
    assert losses.info_nce(a, b, 0.5).item() == pytest.approx(math.log1p(math.exp(0.4)), rel=1e-6)


def test_info_nce_is_cross_entropy_both_ways():
    a, b = units(6, 5, seed=1).float(), units(6, 5, seed=2).float()
    logits, target = a @ b.T / 0.1, torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(losses.info_nce(a, b, 0.1), expected)
    torch.testing.assert_close(losses.info_nce(b, a, 0.1), expected)


def test_same_pairs_are_no_negatives():
    a, b = units(5, 4, seed=1), units(5, 4, seed=2)
    same = torch.eye(5, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    logits = a @ b.T / 0.2
    rows = []
    for scores in (logits, logits.T):
        for i in range(5):
            kept = [j for j in range(5) if j == i or not same[i, j]]
            rows.append(torch.logsumexp(scores[i, kept], 0) - scores[i, i])
    torch.testing.assert_close(losses.info_nce(a, b, 0.2, same), torch.stack(rows).mean().float())
    torch.testing.assert_close(losses.info_nce(a, b, 0.2, torch.zeros_like(same)), losses.info_nce(a, b, 0.2))


def test_nothing_to_contrast_is_zero_with_a_finite_gradient():
    a = units(3, 4).requires_grad_(True)
    loss = losses.info_nce(a, units(3, 4, seed=1), 0.1, torch.ones(3, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and a.grad.isfinite().all()
    assert losses.info_nce(units(1, 4), units(1, 4), 0.1) == 0


def test_info_nce_gradient_in_float64():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, dtype=torch.double, requires_grad=True), torch.randn(3, 4, dtype=torch.double)
    (gradient,) = torch.autograd.grad(losses.info_nce(a, b, 1.0), a)
    logits = a.detach() @ b.T
    rows, columns, eye = logits.softmax(1), logits.softmax(0), torch.eye(3, dtype=torch.double)
    torch.testing.assert_close(gradient, (rows + columns - 2 * eye) @ b / 6, rtol=1e-5, atol=1e-6)


def test_regions_are_contrasted_place_by_place():
    a, b, text = units(4, 3, 5, seed=1), units(4, 3, 5, seed=2), units(4, 5, seed=3)
    same = torch.eye(4, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True
    by_place = torch.stack([losses.info_nce(a[:, p], b[:, p], 0.1, same) for p in range(3)]).mean()
    torch.testing.assert_close(losses.region_info_nce(a, b, 0.1, same), by_place)
    against_text = torch.stack([losses.info_nce(a[:, p], text, 0.1) for p in range(3)]).mean()
    torch.testing.assert_close(losses.region_info_nce(a, text, 0.1), against_text)


def test_other_places_are_further_negatives():
    a, b = units(4, 3, 5, seed=1).double(), units(4, 3, 5, seed=2).double()
    elsewhere = torch.tensor([[1, 2, 0], [2, 0, 1]])
    forward, backward = [], []
    for p in range(3):
        logits = a[:, p] @ b[:, p].t() / 0.1
        further = torch.cat([a[:, p] @ b[:, elsewhere[k, p]].t() / 0.1 for k in range(2)], dim=1)
        forward.append(torch.logsumexp(torch.cat([logits, further], 1), 1) - logits.diagonal())
        backward.append(torch.logsumexp(logits, 0) - logits.diagonal())
    expected = 0.5 * (torch.stack(forward).mean() + torch.stack(backward).mean())
    found = losses.region_info_nce(a, b, 0.1, None, elsewhere)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_other_places_pull_where_all_pictures_are_alike():
    """White background: the gradient is zero without other places, and points to the background with them."""
    ground, figure = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    real = torch.stack([ground, figure]).expand(4, 2, 3)
    fake = torch.nn.functional.normalize(torch.tensor([1.0, 0.0, 0.5]), dim=0).expand(4, 2, 3).clone()
    fake[:, 1] = figure
    fake.requires_grad_(True)
    (alone,) = torch.autograd.grad(losses.region_info_nce(fake, real, 0.5), fake)
    assert alone[:, 0].abs().max() < 1e-7
    (pulled,) = torch.autograd.grad(losses.region_info_nce(fake, real, 0.5, None, torch.tensor([[1, 0]])), fake)
    assert (pulled[:, 0] @ ground < -0.01).all()


def test_words_by_the_formulas_of_the_paper():
    """One caption and one word at a time, as in AttnGAN, sec. 3.2 (without the softmax over the words of a region)."""
    regions, words, sharpness = units(4, 6, 5, seed=1), units(4, 3, 5, seed=2), 5.0
    lengths = [3, 1, 2, 2]
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    same = torch.eye(4, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True
    alike = torch.zeros(4, 4, dtype=torch.double)
    for picture in range(4):
        for caption, length in enumerate(lengths):
            r = []
            for word in words[caption, :length]:
                attention = (sharpness * (regions[picture] @ word)).softmax(0)
                r.append(F.cosine_similarity(attention @ regions[picture], word, dim=0))
            alike[picture, caption] = torch.stack(r).mul(sharpness).exp().sum().log() / sharpness
    rows = []
    for scores in (alike / 0.1, alike.T / 0.1):
        for i in range(4):
            kept = [j for j in range(4) if j == i or not same[i, j]]
            rows.append(torch.logsumexp(scores[i, kept], 0) - scores[i, i])
    found = losses.word_info_nce(regions, words, mask, 0.1, same, sharpness)
    torch.testing.assert_close(found, torch.stack(rows).mean().float(), rtol=1e-5, atol=1e-6)
    rubbish = torch.where(mask[:, :, None], words, 7.0)
    assert losses.word_info_nce(regions, rubbish, mask, 0.1, same, sharpness).equal(found), "padding is not looked at"


def test_words_have_finite_gradients_that_padding_does_not_get():
    regions, words = units(3, 4, 5, seed=1).requires_grad_(True), units(3, 2, 5, seed=2).requires_grad_(True)
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    losses.word_info_nce(regions, words, mask, 0.1).backward()
    assert regions.grad.isfinite().all() and regions.grad.abs().sum(2).gt(0).all()
    assert words.grad.isfinite().all() and words.grad.abs().sum(2).gt(0).equal(mask)


def test_same_pairs_by_picture_or_text():
    same = losses.same_pairs(torch.tensor([7, 7, 8, 9]), torch.tensor([1, 2, 2, 3]))
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[1, 2] = expected[2, 1] = True
    assert same.equal(expected)


# Conditioning and penalties


def test_kl_by_hand_and_against_torch():
    assert losses.kl_condition(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    mean, log_variance = vector(1.0, -0.5)[None], vector(0.4, -1.0)[None]
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.kl_condition(mean, log_variance), expected)


def test_r1_of_a_quadratic_by_hand():
    images = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 3.0]]]]).repeat(1, 3, 1, 1).requires_grad_(True)
    weight = torch.tensor(2.0, requires_grad=True)
    penalty = losses.r1(weight * images.square().sum(dim=(1, 2, 3)), images)
    # gradient 2 w x = 4x: squares summed over 3 channels: 16 * 3 * (1 + 4) and 16 * 3 * 9, mean 336
    assert penalty.item() == pytest.approx(336.0)
    penalty.backward()  # penalty = w^2 * 84, so its derivative is 2 w * 84
    assert weight.grad.item() == pytest.approx(336.0)


def test_ma_gp_by_hand():
    images, sentence = torch.zeros(2, 3, 1, 1).requires_grad_(True), torch.zeros(2, 2).requires_grad_(True)
    logits = images.sum(dim=(1, 2, 3)) + sentence @ vector(1.0, 0.0)  # joint gradient norm sqrt(3 + 1) = 2
    assert losses.ma_gp(logits, images, sentence).item() == pytest.approx(64.0)
    assert losses.ma_gp(logits, images, sentence, power=2.0).item() == pytest.approx(4.0)


def test_finite_difference_tends_to_r1():
    torch.manual_seed(0)
    critic = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    ).double()
    images = torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True)
    exact = losses.r1(critic(images)[:, 0], images)
    noise = torch.randn(20_000, 3, 2, 2, dtype=torch.double)
    with torch.no_grad():
        plain = critic(images)[:, 0].expand(len(noise))
        # in float64 throughout, so that the difference is not lost in rounding
        estimate = ((critic(images + 1e-4 * noise)[:, 0] - plain) / 1e-4).square().mean()
        ours = losses.fd_r1(plain, critic(images + 1e-2 * noise)[:, 0], 1e-2)
    assert estimate.item() == pytest.approx(exact.item(), rel=0.05)
    assert ours.item() == pytest.approx(exact.item(), rel=0.05)


def test_pixel_error_and_way_left():
    """Computed by hand: three rows of one value each; the last row does not count."""
    source, wanted = torch.zeros(3, 3, 2, 2), torch.full((3, 3, 2, 2), 0.8)
    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.4, 0.8, 7.0)])
    rows = torch.tensor([True, True, False])
    assert losses.pixel_error(images, wanted, rows) == pytest.approx(0.4 / 3)
    assert losses.way_left(images, source, wanted, rows) == pytest.approx(0.25 / 3)
    assert losses.way_left(source, source, wanted, rows) == pytest.approx(2 / 3), "copies have it all before them"
    near = source + 0.8 - 0.01  # a tiny change counts as LEAST_WAY
    expected = 0.4**2 / losses.LEAST_WAY / 3
    assert losses.way_left(images[:1].expand(3, -1, -1, -1), near, wanted, rows[[0, 2, 2]]) == pytest.approx(expected)


# Mode seeking


def test_mode_seeking_by_hand():
    first, second = vector(1.0, 0.0).repeat(2, 1), torch.tensor([[0.0, 3.0], [-2.0, 0.0]])  # distances 1 and 2
    assert losses.mode_seeking(first, second).item() == pytest.approx(-0.5 * math.log(2))
    assert losses.mode_seeking(first, first).item() == pytest.approx(-math.log(losses.LEAST_DISTANCE))


def test_mode_seeking_pulls_harder_the_more_alike_two_pictures_are():
    pulls = []
    for angle in (0.1, 0.5, 1.5):
        second = vector(math.cos(angle), math.sin(angle))[None].requires_grad_(True)
        losses.mode_seeking(vector(1.0, 0.0)[None], second).backward()
        pulls.append(second.grad.norm().item())
    assert pulls[0] > 2 * pulls[1] > 4 * pulls[2]


def test_relative_diversity_is_0_where_noise_is_ignored_and_1_where_captions_are():
    captions, pictures = units(64, 16), units(64, 16, seed=1)
    assert losses.relative_diversity(captions, captions).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.relative_diversity(captions, pictures).item() == pytest.approx(1.0, abs=0.1)


def test_the_default_step_of_fd_r1_survives_bf16():
    """With a step that suits fp32, the gradient in bf16 is mostly rounding noise."""
    torch.manual_seed(0)
    d = Discriminator(DiscriminatorConfig(channels=(32, 64, 128), regions=()), 32, 64)
    real, sentence, direction = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 64), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(15):  # logits that depend on the pictures
        fake = torch.tanh(torch.randn_like(real))
        logits = d.adversarial(d.features(real), sentence), d.adversarial(d.features(fake), sentence)
        optimizer.zero_grad()
        losses.hinge_d(*logits).backward()
        optimizer.step()
    coarse = copy.deepcopy(d).bfloat16()
    exact = copy.deepcopy(coarse).float()  # with the same rounded weights

    def gradient(network: Discriminator, sigma: float) -> torch.Tensor:
        dtype = next(network.parameters()).dtype
        network.zero_grad()
        pictures = real.to(dtype), (real + sigma * direction).to(dtype)
        logits, moved = (network.adversarial(network.features(x), sentence.to(dtype)) for x in pictures)
        losses.fd_r1(logits, moved, sigma).backward()
        return torch.cat([p.grad.float().flatten() for p in network.parameters() if p.grad is not None])

    def agreement(sigma: float) -> float:
        return torch.cosine_similarity(gradient(exact, sigma), gradient(coarse, sigma), 0).item()

    assert agreement(losses.FD_SIGMA[torch.bfloat16]) > 0.9
    assert agreement(losses.FD_SIGMA[torch.float32]) < 0.8
