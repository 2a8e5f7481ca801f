"""Pure functions of the images seen: what is due, the learning rate, the lazy penalty.

The functions keep no state, so a resumed run keeps its schedule, even at another world size. `training.ema.ema_decay`
is another such function of the images seen.
"""

from __future__ import annotations

import math

from dist_t2i.config.sections import LossConfig, OptimizerConfig


def passes(every: int, images: int, batch: int) -> bool:
    """Whether the step of `batch` images that ended at `images` seen passed a multiple of `every` (0: never)."""
    return every > 0 and images > 0 and images // every > (images - batch) // every


def learning_rate_scale(images: int, optimizer: OptimizerConfig, total_images: int) -> float:
    """The factor (0 to 1) that multiplies the peak learning rate in the step that begins at `images` seen.

    The factor rises linearly over `warmup_images`, stays at 1 up to the share `decay_start` of `total_images`, and then
    falls to `final_lr_scale` at `total_images`.
    """
    rise, start = warmup(images, optimizer.warmup_images), optimizer.decay_start * total_images
    if optimizer.decay == "constant" or images <= start:
        return rise
    progress = min(1.0, (images - start) / (total_images - start)) if total_images > start else 1.0
    remaining = 1.0 - progress if optimizer.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return rise * (optimizer.final_lr_scale + (1.0 - optimizer.final_lr_scale) * remaining)


def warmup(images: int, warmup_images: int) -> float:
    """A factor that rises to 1 over `warmup_images`. The next image counts as seen, so the first factor is above 0."""
    return min(1.0, (images + 1) / warmup_images) if warmup_images else 1.0


def penalty_scale(step: int, loss: LossConfig) -> float:
    """The weight of the gradient penalty in step `step`, counted from 0.

    Lazy regularization (StyleGAN2, Karras et al. 2020, sec. 3.1): n * `penalty_weight` in every n-th step, otherwise 0.
    """
    if loss.penalty == "none" or step % loss.penalty_every:
        return 0.0
    return loss.penalty_weight * loss.penalty_every
