"""Losses as pure functions of logits, embeddings and gradients; always computed and returned in fp32.

Legend of shapes: B batch, E embedding width, P positions of region maps, T words, L logits a picture, H W pixels. Every
loss is a scalar, a mean over rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_d(real: Tensor, fake: Tensor, mismatched: Tensor | None = None, mismatched_weight: float = 0.5) -> Tensor:
    """The discriminator's hinge loss on logits [B] (or any shape).

    Real pictures with their caption should score above 1; fakes, and real pictures with a wrong caption, below -1. The
    two kinds of negatives share a weight of 1, `mismatched_weight` of it for wrong captions (DF-GAN, eq. 1: a half).
    """
    loss = F.relu(1 - real.float()).mean()
    if mismatched is None or mismatched_weight == 0:
        return loss + F.relu(1 + fake.float()).mean()
    fakes, wrong = F.relu(1 + fake.float()).mean(), F.relu(1 + mismatched.float()).mean()
    return loss + (1 - mismatched_weight) * fakes + mismatched_weight * wrong


def hinge_g(fake: Tensor) -> Tensor:
    """The generator's loss beside `hinge_d`: minus the mean logit of its pictures."""
    return -fake.float().mean()


def _contrast(logits: Tensor, same: Tensor | None, further: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the diagonal in both directions; logits [..., B, B]; `same` pairs leave the denominator.

    further: [..., B, K], logits of more negatives for the rows; the columns have none.
    """
    rows = logits.shape[-1]
    if same is not None:
        others = same & ~torch.eye(rows, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    positive = logits.diagonal(dim1=-2, dim2=-1)
    across = logits if further is None else torch.cat([logits, further], dim=-1)
    forward = torch.logsumexp(across, dim=-1) - positive
    backward = torch.logsumexp(logits, dim=-2) - positive
    return 0.5 * (forward.mean() + backward.mean())


def info_nce(a: Tensor, b: Tensor, temperature: float, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP): row i of `a` and row i of `b` belong together.

    a, b: unit vectors [B, E]. `same` bool [B, B], symmetric: pairs that show the same picture or say the same text,
    which are never each other's negatives (its diagonal is ignored). 0 for a batch of one.
    """
    return _contrast(a.float() @ b.float().t() / temperature, same)


def region_info_nce(
    a: Tensor, b: Tensor, temperature: float, same: Tensor | None = None, elsewhere: Tensor | None = None
) -> Tensor:
    """`info_nce` at each position of region maps by itself, averaged over positions.

    a: unit vectors [B, P, E]. b: [B, P, E] (position p of one picture against position p of the others: the contrast of
    patches of Park et al. 2020, with other pictures instead of other places as negatives) or [B, E] (every position
    against the captions: the word-region contrast of AttnGAN and XMC-GAN with the sentence as the word, our reading).

    elsewhere: int64 [K, P], for b [B, P, E]: position p of `a` has also the positions elsewhere[:, p] of all of b as
    negatives. Without them nothing pulls where all pictures look alike, such as a white ground: positive and negatives
    are the same there, and their gradients cancel.
    """
    a = a.float().transpose(0, 1).contiguous()  # positions first and contiguous: strided batches multiply slowly
    b = b.float().t() if b.dim() == 2 else b.float().permute(1, 2, 0).contiguous()
    further = None if elsewhere is None else torch.cat([a @ b[places] for places in elsewhere], dim=2) / temperature
    return _contrast(a @ b / temperature, same, further)


def word_info_nce(
    regions: Tensor, words: Tensor, mask: Tensor, temperature: float, same: Tensor | None = None, sharpness: float = 5.0
) -> Tensor:
    """`info_nce` of pictures and captions whose likeness is counted word by word (AttnGAN, sec. 3.2: DAMSM).

    regions: unit vectors [B, P, E] of pictures; words: unit vectors [B, T, E] of captions; mask bool [B, T]: True at a
    caption's own words, one or more. Each word looks for its regions of a picture (softmax of sharpness * cosine) and is
    compared with their mean by a cosine R; caption and picture are alike as far as log(sum over words of exp(sharpness *
    R)) / sharpness says (eq. 10). As in XMC-GAN (Zhang et al. 2021, sec. 3.3) the words do not compete for a region first.

    Memory: a few times B * P * N floats, N words in all B captions.
    """
    regions, own = regions.float(), words.float()[mask]  # [N, E]: one caption's words after the other's
    cosines = regions @ own.t()
    found = (sharpness * cosines).softmax(dim=1).transpose(1, 2) @ regions  # [B, N, E]
    agreement = F.cosine_similarity(found, own, dim=2)
    by_caption = agreement.new_full((len(regions), *mask.shape), float("-inf"))
    by_caption[:, mask] = sharpness * agreement
    return _contrast(by_caption.logsumexp(dim=2) / (sharpness * temperature), same)


def same_pairs(image_ids: Tensor, caption_ids: Tensor) -> Tensor:
    """int64 [B] each -> bool [B, B]: True where two rows share the picture or the caption (and on the diagonal)."""
    return (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)


def kl_condition(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), averaged over rows and dimensions (StackGAN, eq. 2). [B, C] each."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def pixel_error(images: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    """Mean absolute error of those `rows`, bool [B], of pictures [B, 3, H, W]; a mean over all B rows (others count 0)."""
    return ((images.float() - wanted.float()).abs().mean(dim=(1, 2, 3)) * rows).mean()


LEAST_WAY = 0.02
"""Mean squared difference, of pixels in [-1, 1], that source and target are taken to have at least: that of two like skin
tones of a drawing. Where there is nearly none the share would be noise."""


def way_left(images: Tensor, source: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    """The squared distance of pictures [B, 3, H, W] to those wanted, as a share of what it was for their sources: 1 for a
    copy, 0 where all is as wanted. Of those `rows`, bool [B]; a mean over all B rows (others count 0).

    A share, so that a picture of which little is to change asks as much as one of which nothing stays. Our own.
    """
    left = (images.float() - wanted.float()).square().mean(dim=(1, 2, 3))
    whole = (source.float() - wanted.float()).square().mean(dim=(1, 2, 3))
    return (left / whole.clamp_min(LEAST_WAY) * rows).mean()


def row_means(logits: Tensor) -> Tensor:
    """One fp32 logit a picture, [B]: its only one, or the mean of its places [B, L]."""
    return logits.float().reshape(len(logits), -1).mean(1)


def r1(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018) without its factor 1/2: squared gradient, summed over a picture, averaged over rows.

    logits ([B] or [B, L], see `row_means`) must come from `images` [B, 3, H, W], which must require a gradient; the
    result can be differentiated again.
    """
    (gradient,) = torch.autograd.grad(row_means(logits).sum(), images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def ma_gp(logits: Tensor, images: Tensor, sentence: Tensor, power: float = 6.0) -> Tensor:
    """DF-GAN's matching-aware gradient penalty (eq. 2, p = 6) without its factor: mean of joint gradient norm ** power.

    logits ([B] or [B, L], see `row_means`) must come from `images` [B, 3, H, W] and `sentence` [B, E] of matching real
    pairs; both must require a gradient.
    """
    gradients = torch.autograd.grad(row_means(logits).sum(), (images, sentence), create_graph=True)
    flat = torch.cat([g.float().flatten(1) for g in gradients], dim=1)
    return flat.square().sum(1).clamp_min(1e-12).pow(power / 2).mean()


def fd_r1(logits: Tensor, perturbed: Tensor, sigma: float) -> Tensor:
    """R1 by a finite difference: mean of ((D(x + sigma * n) - D(x)) / sigma) ** 2 with n standard normal.

    Its expectation over n tends to `r1`'s value as sigma -> 0, and it needs no second derivative, so that parameters
    may be sharded (ZeRO stage 3). logits, perturbed: [B] or [B, L].
    """
    return ((row_means(perturbed) - row_means(logits)) / sigma).square().mean()
