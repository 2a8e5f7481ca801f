"""Losses as pure functions of logits, embeddings and gradients; always computed and returned in fp32.

Legend of shapes: B batch, E embedding width, P positions of region maps, T words, L logits per picture, H W pixels.
Each loss is a scalar, a mean over rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_d(real: Tensor, fake: Tensor, mismatched: Tensor | None = None, mismatched_weight: float = 0.5) -> Tensor:
    """The discriminator's hinge loss (Lim & Ye 2017; Miyato et al. 2018) on logits [B] (or any shape).

    Real pictures with their caption should score above 1. Fakes, and real pictures with a wrong caption, should score
    below -1. The two kinds of negatives have weights that sum to 1: `mismatched_weight` for wrong captions (a half in
    DF-GAN, Eq. 1), the rest for fakes.
    """
    loss, fakes = F.relu(1 - real.float()).mean(), F.relu(1 + fake.float()).mean()
    if mismatched is None or mismatched_weight == 0:
        return loss + fakes
    wrong = F.relu(1 + mismatched.float()).mean()
    return loss + (1 - mismatched_weight) * fakes + mismatched_weight * wrong


def hinge_g(fake: Tensor) -> Tensor:
    """The generator's counterpart of `hinge_d`: minus the mean logit of its pictures."""
    return -fake.float().mean()


def _contrast(logits: Tensor, same: Tensor | None, further: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the diagonal in both directions; logits [..., B, B].

    further: [..., B, K], logits of more negatives, which enter only the cross entropy over rows.
    """
    # Remove `same` pairs from the denominator, except each row's pair with itself.
    rows = logits.shape[-1]
    if same is not None:
        others = same & ~torch.eye(rows, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))

    # InfoNCE (van den Oord et al. 2018, Eq. 4): -log(exp(l_ii) / sum_j exp(l_ij)), [..., B], over rows and columns.
    positive = logits.diagonal(dim1=-2, dim2=-1)
    across = logits if further is None else torch.cat([logits, further], dim=-1)
    forward = torch.logsumexp(across, dim=-1) - positive
    backward = torch.logsumexp(logits, dim=-2) - positive
    return 0.5 * (forward.mean() + backward.mean())


def info_nce(a: Tensor, b: Tensor, temperature: float, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, Eq. 4; CLIP): row i of `a` and row i of `b` are a positive pair.

    a, b: unit vectors [B, E]. `same` bool [B, B], symmetric: pairs that share the picture or the caption, which are
    never each other's negatives (its diagonal is ignored). The loss is 0 for a batch of one.
    """
    return _contrast(a.float() @ b.float().t() / temperature, same)


def region_info_nce(
    a: Tensor, b: Tensor, temperature: float, same: Tensor | None = None, elsewhere: Tensor | None = None
) -> Tensor:
    """`info_nce` at each position of region maps separately, averaged over positions.

    a: unit vectors [B, P, E]. b: [B, P, E] or [B, E]. With b [B, P, E], position p of a picture is compared with
    position p of the others (PatchNCE of Park et al. 2020, with other pictures instead of other positions as
    negatives). With b [B, E], each position is compared with the captions (the word-region contrast of AttnGAN and
    XMC-GAN with the sentence as the word, our reading). elsewhere: int64 [K, P], for b [B, P, E]: the positions
    elsewhere[:, p] of all pictures in b are also negatives of position p of `a`. Without `elsewhere`, the gradient
    vanishes where all pictures look alike, such as on a white background, because positive and negatives are equal
    there.
    """
    # Positions first and contiguous, because strided batches multiply slowly: a [P, B, E], b [P, E, B] or [E, B].
    a = a.float().transpose(0, 1).contiguous()
    b = b.float().t() if b.dim() == 2 else b.float().permute(1, 2, 0).contiguous()

    # Logits with the same position of all pictures, [P, B, B], and with K further positions, [P, B, K * B].
    further = None if elsewhere is None else torch.cat([a @ b[index] for index in elsewhere], dim=2) / temperature
    return _contrast(a @ b / temperature, same, further)


def word_info_nce(
    regions: Tensor, words: Tensor, mask: Tensor, temperature: float, same: Tensor | None = None, sharpness: float = 5.0
) -> Tensor:
    """`info_nce` of pictures and captions, scored word by word (DAMSM: AttnGAN, sec. 3.2).

    regions: unit vectors [B, P, E] of pictures; words: unit vectors [B, T, E] of captions; mask bool [B, T], True at a
    caption's words (at least one). As in XMC-GAN (Zhang et al. 2021, sec. 3.3), similarities are not normalized over
    words first, unlike in AttnGAN's Eq. 8. Memory: a few times B * P * N floats, for N words in all B captions.
    """
    # Similarities of all regions with the N words of all captions, concatenated (Eq. 7): [B, P, N].
    regions, own = regions.float(), words.float()[mask]
    cosines = regions @ own.t()

    # Each word attends to the regions of a picture (Eq. 9, gamma 1 = sharpness): contexts [B, N, E].
    context = (sharpness * cosines).softmax(dim=1).transpose(1, 2) @ regions

    # Relevance R(context, word) as a cosine, [B, N], then back to [B, B, T] with -inf for padding.
    relevance = F.cosine_similarity(context, own, dim=2)
    by_caption = relevance.new_full((len(regions), *mask.shape), float("-inf"))
    by_caption[:, mask] = sharpness * relevance

    # The score of picture and caption is log(sum over words of exp(gamma 2 * R)) / gamma 2 (Eq. 10), [B, B]; the
    # contrast goes both ways (Eq. 11-13, gamma 3 = 1 / temperature).
    return _contrast(by_caption.logsumexp(dim=2) / (sharpness * temperature), same)


LEAST_DISTANCE = 1e-3
"""Lower bound of a cosine distance in `mode_seeking`, which bounds the loss and its gradient for equal pictures."""


def mode_seeking(first: Tensor, second: Tensor) -> Tensor:
    """Minus the mean logarithm of the cosine distance between D's features of two pictures per caption. Our own form of
    mode seeking (MSGAN, Mao et al. 2019, sec. 3.2).

    first, second: features [R, A], before any caption enters them, of two fakes of the same caption from independent
    noise. MSGAN maximizes a ratio of distances in pixels and in noise. Here the logarithm makes the gradient strong
    while two pictures are alike, and weak once they differ. D's features ignore differences that nobody sees.
    """
    return -_cosine_distance(first, second).clamp_min(LEAST_DISTANCE).log().mean()


def relative_diversity(first: Tensor, second: Tensor) -> Tensor:
    """Mean cosine distance between two fakes of the same caption, divided by that between fakes of different captions:
    0 if the generator ignores the noise. Features [R, A] as in `mode_seeking`."""
    across = _cosine_distance(first, second.roll(1, dims=0)).mean()
    return _cosine_distance(first, second).mean() / across.clamp_min(LEAST_DISTANCE)


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of each pair of rows: [R, A], [R, A] -> [R]."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=1)


def same_pairs(image_ids: Tensor, caption_ids: Tensor) -> Tensor:
    """int64 [B] each -> bool [B, B]: True where two rows share the picture or the caption."""
    return (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)


def kl_condition(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), averaged over rows and dimensions (StackGAN, Eq. 2). [B, C] each."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def pixel_error(images: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Mean absolute error of pictures [B, 3, H, W]. The mean is over all B rows; rows that are False in `rows`, bool
    [B], contribute an error of 0."""
    return ((images.float() - target.float()).abs().mean(dim=(1, 2, 3)) * rows).mean()


LEAST_WAY = 0.02
"""Lower bound of `way_left`'s denominator; with a smaller denominator, the ratio would be noise. For comparison:
drawings in two similar skin tones have about this mean squared difference (pixels in [-1, 1])."""


def way_left(images: Tensor, source: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Squared distance of pictures [B, 3, H, W] to their targets, divided by the squared distance of their sources to
    the targets: 1 for a copy of the source, 0 at the target. The mean is over all B rows; rows that are False in
    `rows`, bool [B], contribute 0. Our idea.

    The ratio gives small and large changes of a picture the same weight. The distance is squared. With the
    absolute error, a copy of the source would remain the best answer for a long time, because most pixels of source and
    target agree.
    """
    distance = (images.float() - target.float()).square().mean(dim=(1, 2, 3))
    start = (source.float() - target.float()).square().mean(dim=(1, 2, 3))
    return (distance / start.clamp_min(LEAST_WAY) * rows).mean()


def row_means(logits: Tensor) -> Tensor:
    """One fp32 logit per picture, [B], from logits [B] or the mean of [B, L]."""
    return logits.float().reshape(len(logits), -1).mean(1)


def r1(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, Eq. 9) without its factor 1/2: squared gradient norm per picture, averaged over rows.

    logits ([B] or [B, L]) must be computed from `images` [B, 3, H, W], which must require a gradient.
    """
    # Rows do not interact, so the gradient of the sum is each row's own gradient: [B, 3, H, W].
    (gradient,) = torch.autograd.grad(row_means(logits).sum(), images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def ma_gp(logits: Tensor, images: Tensor, sentence: Tensor, power: float = 6.0) -> Tensor:
    """DF-GAN's matching-aware gradient penalty (MA-GP, Eq. 2, p = 6) without its factor: mean joint gradient norm ** p.

    logits ([B] or [B, L]) must be computed from `images` [B, 3, H, W] and `sentence` [B, E] of matching real pairs.
    Both must require a gradient.
    """
    # Gradients by picture and by sentence, concatenated: [B, 3 H W + E].
    gradients = torch.autograd.grad(row_means(logits).sum(), (images, sentence), create_graph=True)
    flat = torch.cat([g.float().flatten(1) for g in gradients], dim=1)
    return flat.square().sum(1).clamp_min(1e-12).pow(power / 2).mean()


FD_SIGMA = {torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Step of `fd_r1` by the number format of the discriminator. In bf16, whose logits have three digits, the gradient of
`fd_r1` with a step of 0.01 is mostly rounding noise."""


def fd_r1(logits: Tensor, perturbed: Tensor, sigma: float) -> Tensor:
    """R1 by a finite difference: mean of ((D(x + sigma * n) - D(x)) / sigma) ** 2 with n standard normal.

    Its expectation over n tends to `r1` as sigma -> 0. `fd_r1` needs no second derivative, so that parameters may be
    sharded (ZeRO stage 3). logits, perturbed: [B] or [B, L].
    """
    return ((row_means(perturbed) - row_means(logits)) / sigma).square().mean()
