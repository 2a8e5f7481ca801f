"""Linear analysis of embeddings: pure functions of vectors and labels.

If a linear probe (Alain & Bengio 2016) reads a property from an embedding, the next layer can use this property, but
may ignore it. A caption states the property in words, so the score of a probe is meaningful only in comparison with two
baselines: a bag of words, which contains all information in the caption, and an untrained encoder of the same kind,
which contains what the architecture alone preserves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_t2i.data.tokenizer import words

STRENGTHS = (1e-3, 1e-2, 1e-1)
"""The weight decays that a probe tries."""


def probe(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Predicts classes int64 [M] of test [M, E], by multinomial logistic regression on train [N, E] and labels [N].

    Features are standardized with the mean and standard deviation of the training rows. To select the weight decay, the
    probe is fitted to four fifths of the training rows and scored on the others. The final fit uses all training rows.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    varying = std > 1e-6  # constant features carry no information
    train, test = (((rows.double() - mean) / std)[:, varying] for rows in (train, test))
    fifth = torch.arange(len(train)) % 5 == 4
    best = STRENGTHS[-1]
    if len(train) >= 20:
        fits = [_fit(train[~fifth], labels[~fifth], classes, decay) for decay in STRENGTHS]
        hits = [(fit(train[fifth]) == labels[fifth]).sum() for fit in fits]
        best = STRENGTHS[int(torch.stack(hits).argmax())]
    return _fit(train, labels, classes, best)(test)


def _fit(rows: Tensor, labels: Tensor, classes: int, decay: float) -> Callable[[Tensor], Tensor]:
    """A function from rows [M, E] to predicted classes [M]."""
    weight = torch.zeros(rows.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return lambda rows: (rows @ weight.detach() + bias.detach()).argmax(1)


def bag_of_words(train: Sequence[str], test: Sequence[str]) -> tuple[Tensor, Tensor]:
    """One column per word of the training texts: 1 if a text has the word, else 0; float32 [N, V] and [M, V]."""
    index = {word: i for i, word in enumerate(sorted({word for text in train for word in words(text)}))}

    def rows(texts: Sequence[str]) -> Tensor:
        counts = torch.zeros(len(texts), len(index))
        for row, text in enumerate(texts):
            counts[row, [index[word] for word in words(text) if word in index]] = 1.0
        return counts

    return rows(train), rows(test)


def nearest(vectors: Tensor, count: int) -> Tensor:
    """Row numbers int64 [N, count] of the nearest other rows of vectors [N, E] by cosine, nearest first."""
    # The mean is removed, because it is common to all texts and would dominate the cosine.
    centered = F.normalize(vectors.double() - vectors.double().mean(0), dim=1)
    return (centered @ centered.T).fill_diagonal_(-2.0).topk(min(count, len(vectors) - 1), dim=1).indices


def plane(vectors: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The two principal components [N, 2] of vectors [N, E], with the largest loading positive, and variance shares."""
    centered = vectors.double() - vectors.double().mean(0)
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
    axes = directions[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    shares = (singular.square() / singular.square().sum().clamp_min(1e-12))[:2].tolist()
    return centered @ axes.T, (shares[0], shares[1])


def explained(vectors: Tensor, labels: Tensor) -> float:
    """The share of the variance of vectors [N, E] that is explained by classes int64 [N]: omega squared, summed over E.

    For uninformative classes, omega squared is about 0, whereas the ratio of variances grows with the number of
    classes. The result is NaN if every class has only one member.
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
