"""Metrics compared with values computed by hand or by brute force."""

import importlib.util
import math

import pytest
import torch

from dist_t2i.eval import metrics
from dist_t2i.eval.judges.torch_fidelity import torch_fidelity
from dist_t2i.eval.protocol import Protocol
from dist_t2i.eval.scoring import fidelity_frechet, subset_kid

fidelity = pytest.mark.skipif(not importlib.util.find_spec("torch_fidelity"), reason="needs torch-fidelity")


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
    assert metrics.kid_resamples(a, b, ones).tolist() == pytest.approx([metrics.kid(a, b)] * 2)
    values = rows(24, 1)[:, 0]
    assert metrics.weighted_mean(values, ones).tolist() == pytest.approx([values.double().mean().item()] * 2)


def test_weights_of_zero_leave_rows_out():
    a = rows(12)
    half = torch.ones(1, 12, dtype=torch.double)
    half[:, 6:] = 0
    left = torch.tensor([[1.0] * 6 + [0.0] * 6], dtype=torch.double)
    a = a.double()
    kernel = (a[:6] @ a[:6].T + 1) ** 3
    assert metrics.off_diagonal_mean(a, a, left).item() == pytest.approx(
        (kernel.sum() - kernel.diagonal().sum()).item() / 30, rel=1e-10
    )
    values = torch.arange(12.0)
    assert metrics.weighted_mean(values, half).item() == pytest.approx(2.5)


def test_bootstrapped_kid_stays_around_the_value():
    a, b = rows(100), rows(100, seed=1, shift=0.3)
    value = metrics.kid(a, b)
    resampled = metrics.kid_resamples(a, b, metrics.bootstrap_weights(range(100), 2000))
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


def test_many_rows_are_taken_in_blocks(monkeypatch):
    a, b, weights = rows(30), rows(30, seed=1), metrics.bootstrap_weights(range(30), 20)
    whole = [metrics.kid(a, b), *metrics.kid_resamples(a, b, weights).tolist()]
    inside = metrics.in_manifold(a, b)
    monkeypatch.setattr(metrics, "_blocks", lambda n, size=7: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])
    assert [metrics.kid(a, b), *metrics.kid_resamples(a, b, weights).tolist()] == pytest.approx(whole, rel=1e-12)
    assert torch.equal(metrics.in_manifold(a, b), inside)


# ---- the field's metrics, against torch-fidelity's functions on the same features -------------------------------------


@fidelity
@pytest.mark.parametrize(("n", "m"), [(60, 50), (20, 60), (12, 9)])
def test_frechet_is_torch_fidelitys(n, m):
    """Two methods give the same trace, with more rows than columns and with fewer."""
    a, b = rows(n, d=24), 1.5 * rows(m, d=24, seed=1, shift=0.2)
    assert metrics.frechet(a, b) == pytest.approx(fidelity_frechet(a, b), rel=1e-6)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9 * n)


def test_weighted_frechet_is_that_of_repeated_rows():
    a, b = rows(40, d=6), rows(30, d=6, seed=1)
    counts = metrics.bootstrap_weights(range(30), 1)[0]
    repeated = b.repeat_interleave(counts.long(), dim=0)
    assert metrics.frechet(a, b, None, counts) == pytest.approx(metrics.frechet(a, repeated), rel=1e-9)


@fidelity
def test_inception_score_is_torch_fidelitys():
    module, logits = torch_fidelity("metric_isc"), 3 * rows(50, d=10)
    theirs = module.isc_features_to_metric(logits, splits=1)[module.KEY_METRIC_ISC_MEAN]
    assert metrics.inception_score(logits) == pytest.approx(theirs, rel=1e-9)
    assert metrics.inception_score(logits[:1].expand(9, -1)) == pytest.approx(1.0)
    certain = torch.eye(10).repeat(3, 1) * 1000
    assert metrics.inception_score(certain) == pytest.approx(10.0)


@fidelity
def test_precision_and_recall_are_torch_fidelitys():
    fake, real = rows(60, d=4), rows(50, d=4, seed=1, shift=0.7)
    precision, recall = torch_fidelity("metric_prc").calculate_precision_recall_full(fake, real, neighborhood=3)
    assert 0 < precision < 1 and 0 < recall < 1
    assert metrics.in_manifold(fake, real, 3).mean().item() == pytest.approx(precision, abs=1e-6)
    assert metrics.in_manifold(real, fake, 3).mean().item() == pytest.approx(recall, abs=1e-6)


@fidelity
def test_kid_over_one_whole_subset_is_the_kernel_distance():
    protocol = Protocol("test", kid_subsets=1, kid_subset_size=1000)
    a, b = rows(40, d=16), rows(40, d=16, seed=1, shift=0.3)
    assert subset_kid(a, b, protocol) == pytest.approx(metrics.kid(a, b, scaled=False), rel=1e-9)


def test_mismatched_captions_are_other_ones_and_the_same_ones_every_time():
    captions = ["a red square", "A  red square", "a blue bar", "a green bar", "a blue bar", "a disc"]
    others = metrics.mismatched(captions, 99)
    assert torch.equal(others, metrics.mismatched(captions, 99))
    for row, chosen in enumerate(others.tolist()):
        texts = {" ".join(captions[i].lower().split()) for i in chosen}
        assert len(texts) == len(chosen) == 3 and captions[row].lower() not in texts
    assert metrics.mismatched(captions, 2).shape == (6, 2)
    many = [f"caption {i}" for i in range(300)]
    assert metrics.mismatched(many, 99).shape == (300, 99)
    assert metrics.mismatched(many, 99)[0].tolist()[:4] == [214, 158, 219, 118], "the rule is committed"


def test_r_precision_counts_ties_against():
    texts = torch.eye(3)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]])
    pictures = torch.tensor([[1.0, 0.5, 0], [1.0, 1.0, 0], [0, 0, 0]])
    assert metrics.r_precision(pictures, texts, others).tolist() == [1.0, 0.0, 0.0]
    assert metrics.r_precision(pictures, texts, others[:, :0]).tolist() == [1.0, 1.0, 1.0]


def test_clip_score_is_a_cosine_in_percent():
    pictures, texts = torch.tensor([[2.0, 0], [1, 1], [-1, 0]]), torch.tensor([[1.0, 0], [3, 0], [1, 0]])
    assert metrics.clip_score(pictures, texts).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0])


def test_normal_interval():
    resampled = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    low, high = metrics.around(10.0, resampled)
    assert low == pytest.approx(10 - 1.96, abs=0.1) and high == pytest.approx(10 + 1.96, abs=0.1)
