"""Metrics against values worked out by hand or by brute force."""

import math

import pytest
import torch

from dist_t2i.eval import metrics


def rows(n, d=8, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_is_the_mean_over_pairs_of_different_rows():
    a, b = rows(4), rows(3, seed=1)

    def kernel(x, y):
        return (torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=0).item() + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_b = sum(kernel(b[i], b[j]) for i in range(3) for j in range(3) if i != j) / 6
    between = sum(kernel(x, y) for x in a for y in b) / 12
    assert metrics.kid(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-10)


def test_kid_of_alike_sets_is_zero_on_average_and_grows_with_the_shift():
    alike = [metrics.kid(rows(40, seed=2 * s), rows(40, seed=2 * s + 1)) for s in range(100)]
    spread = torch.tensor(alike).std().item() / 10
    assert abs(sum(alike) / 100) < 4 * spread
    near, far = (metrics.kid(rows(40), rows(40, seed=1, shift=shift)) for shift in (0.5, 2.0))
    assert 0 < near < far


def test_kid_needs_two_rows():
    with pytest.raises(ValueError, match="at least 2"):
        metrics.kid(rows(1), rows(5))


def test_weights_of_one_change_nothing():
    a, b = rows(12), rows(12, seed=1)
    ones = torch.ones(2, 12, dtype=torch.double)
    assert metrics.kid(a, b, ones).tolist() == pytest.approx([metrics.kid(a, b)] * 2)
    values = rows(24, 1)[:, 0]
    assert metrics.weighted_mean(values, ones).tolist() == pytest.approx([metrics.weighted_mean(values)] * 2)


def test_weights_of_zero_leave_rows_out():
    a, b = rows(12), rows(12, seed=1)
    half = torch.ones(1, 12, dtype=torch.double)
    half[:, 6:] = 0
    left = torch.tensor([[1.0] * 6 + [0.0] * 6], dtype=torch.double)
    within = [metrics.off_diagonal_mean((x @ x.T).double(), left) for x in (a, b)]
    assert within[0].item() == pytest.approx(((a[:6] @ a[:6].T).sum() - (a[:6] ** 2).sum()).item() / 30, rel=1e-5)
    values = torch.arange(12.0)
    assert metrics.weighted_mean(values, half).item() == pytest.approx(2.5)


def test_bootstrapped_kid_stays_around_the_value():
    a, b = rows(100), rows(100, seed=1, shift=0.3)
    value = metrics.kid(a, b)
    resampled = metrics.kid(a, b, metrics.bootstrap_weights(range(100), 2000))
    low, high = metrics.interval(resampled)
    assert low < value < high
    assert abs(resampled.mean().item() - value) < 0.1 * (high - low)


def test_retrieval_ranks_count_nearer_pictures_and_ties():
    pictures = torch.eye(3)
    queries = torch.tensor([[1.0, 0, 0], [1.0, 0.5, 0], [1.0, 1.0, 0.5]])
    assert metrics.retrieval_ranks(queries, pictures).tolist() == [0, 1, 2]
    assert metrics.retrieval_ranks(torch.ones(3, 3), pictures).tolist() == [2, 2, 2]
    two_seeds = torch.cat([queries, pictures])
    assert metrics.retrieval_ranks(two_seeds, pictures).tolist() == [0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 5])
def test_recall_is_the_mean_over_drawn_galleries(k):
    generator = torch.Generator().manual_seed(0)
    total, gallery, draws = 30, 10, 20_000
    ranks = torch.tensor([0, 1, 4, 12, 29])
    exact = metrics.recall_at(k, ranks, total, gallery)
    for rank, expected in zip(ranks.tolist(), exact.tolist(), strict=True):
        order = torch.rand(draws, total - 1, generator=generator).argsort(1)[:, : gallery - 1]
        hits = ((order < rank).sum(1) < k).double()
        assert hits.mean().item() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(draws))


def test_recall_with_a_small_set_uses_all_of_it():
    assert metrics.recall_at(1, torch.tensor([0, 1]), pictures=5).tolist() == [1.0, 0.0]
    assert metrics.recall_at(5, torch.tensor([0, 4]), pictures=5).tolist() == [1.0, 1.0]
    assert metrics.recall_at(1, torch.tensor([0]), pictures=1).tolist() == [1.0]


def test_tone_pairs():
    assert metrics.tone_pair("man vampire medium-dark skin tone") == (
        "man vampire light skin tone",
        "man vampire dark skin tone",
    )
    assert metrics.tone_pair("woman light skin tone beard") == (
        "woman light skin tone beard",
        "woman dark skin tone beard",
    )
    for caption in ("root vegetable", "handshake light skin tone dark skin tone", "skin tone", "starlight skin tone"):
        assert metrics.tone_pair(caption) is None


def test_tone_order_compares_brightness():
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    darker = grey.clone()
    darker[0, :, 0, 0] = 90
    assert metrics.tone_order(grey, darker).tolist() == [1.0]
    assert metrics.tone_order(darker, grey).tolist() == [0.0]
    assert metrics.tone_order(grey, grey).tolist() == [0.0]
    assert metrics.brightness(grey).item() == pytest.approx(100)


def test_bootstrap_weights_are_fixed_and_add_up():
    first, second = (metrics.bootstrap_weights(range(7), 50) for _ in range(2))
    assert torch.equal(first, second)
    assert first.sum(1).tolist() == [7.0] * 50


def test_rows_of_a_group_are_drawn_together():
    weights = metrics.bootstrap_weights(["chef", "pilot", "chef", "judge"], 50)
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3]).tolist() == [3.0] * 50
