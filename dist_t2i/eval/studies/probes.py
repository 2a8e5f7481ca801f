"""What can be read from embeddings with straight lines: pure functions of vectors and labels.

A linear probe (Alain & Bengio 2016) that finds a property in an embedding says that it is there in a form which the next
layer can use, not that the network uses it. Words are in captions in any case, so a probe means something beside the two
baselines only: a bag of words (everything that is said, word by word), and an encoder of the same kind that was never
trained (what the architecture passes on by itself).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_t2i.data.tokenizer import words

STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Weight decays that a probe chooses from."""


def probe(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Predicted classes int64 [M] of test [M, E] by multinomial logistic regression on train [N, E], labels int64 [N].

    Features are standardised by the training rows. The weight decay is the one of `STRENGTHS` that does best on every
    fifth training row when fitted to the others.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    told = std > 1e-6  # what never changes in training tells nothing
    train, test = (((rows.double() - mean) / std)[:, told] for rows in (train, test))
    aside = torch.arange(len(train)) % 5 == 4
    best = STRENGTHS[-1]
    if aside.any() and len(train) >= 20:
        found = [
            (_predict(_fit(train[~aside], labels[~aside], classes, decay), train[aside]) == labels[aside]).sum()
            for decay in STRENGTHS
        ]
        best = STRENGTHS[int(torch.stack(found).argmax())]
    return _predict(_fit(train, labels, classes, best), test)


def _fit(rows: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(rows.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _predict(fitted: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    weight, bias = fitted
    return (rows @ weight + bias).argmax(1)


def bag_of_words(train: Sequence[str], test: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Which words of the training texts each text has: float32 [N, V] and [M, V]."""
    index = {word: i for i, word in enumerate(sorted({word for text in train for word in words(text)}))}

    def rows(texts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(texts), len(index))
        for row, text in enumerate(texts):
            found[row, [index[word] for word in words(text) if word in index]] = 1.0
        return found

    return rows(train), rows(test)


def nearest(vectors: Tensor, count: int) -> Tensor:
    """Row numbers int64 [N, count] of the nearest other rows of vectors [N, E], nearest first.

    By the cosine after the mean is taken off: what all texts share would make everything alike.
    """
    centred = F.normalize(vectors.double() - vectors.double().mean(0), dim=1)
    return (centred @ centred.T).fill_diagonal_(-2.0).topk(min(count, len(vectors) - 1), dim=1).indices


def plane(vectors: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The two principal components of vectors [N, E] as [N, 2], and the share of the variance that each holds.

    Signs are fixed (the largest loading is positive), so that the same vectors give the same map.
    """
    centred = vectors.double() - vectors.double().mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    axes = directions[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    shares = (singular.square() / singular.square().sum().clamp_min(1e-12))[:2].tolist()
    return centred @ axes.T, (shares[0], shares[1])


def explained(vectors: Tensor, labels: Tensor) -> float:
    """The share of the variance of vectors [N, E] that classes int64 [N] account for: omega squared, summed over E.

    Unlike the plain ratio it is about 0 for classes that say nothing, however many there are. NaN where no class has two.
    """
    vectors = vectors.double() - vectors.double().mean(0)
    classes, index = labels.unique(return_inverse=True)
    counts = index.bincount().double()
    means = torch.zeros(len(classes), vectors.shape[1], dtype=torch.double).index_add_(0, index, vectors)
    total = vectors.square().sum()
    between = (means.square().sum(1) / counts).sum()
    noise = (total - between) / (len(vectors) - len(classes)) if len(vectors) > len(classes) else torch.nan
    return float((between - (len(classes) - 1) * noise) / (total + noise))


def alike(a: Tensor, b: Tensor) -> float:
    """Linear CKA (Kornblith et al. 2019, eq. 4) of two embeddings [N, E] and [N, F] of the same texts: 0 to 1."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-12)).item()
