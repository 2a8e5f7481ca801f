"""What changes over a run, as pure functions of the images seen: learning rate, lazy penalty, EMA decay.

No state is kept, so a resumed run is on schedule by construction, whatever its world size.
"""

from __future__ import annotations

import math

from dist_t2i.config import EmaConfig, LossConfig, OptimizerConfig


def learning_rate_scale(images: int, optimizer: OptimizerConfig, total_images: int) -> float:
    """Factor on the peak learning rate of the step that begins at `images`; in 0..1.

    Rises linearly over `warmup_images` (the first step gets a batch-independent 0 only if it starts at image 0: see
    `warmup`), stays at 1 until `decay_start` of `total_images`, then falls to `final_lr_scale` at `total_images`.
    """
    return warmup(images, optimizer.warmup_images) * _decay(images, optimizer, total_images)


def warmup(images: int, warmup_images: int) -> float:
    """Linear rise from just above 0 to 1; the image that is about to be seen counts, so no step is wasted at 0."""
    return min(1.0, (images + 1) / warmup_images) if warmup_images else 1.0


def _decay(images: int, optimizer: OptimizerConfig, total_images: int) -> float:
    start = optimizer.decay_start * total_images
    if optimizer.decay == "constant" or images <= start:
        return 1.0
    progress = min(1.0, (images - start) / (total_images - start)) if total_images > start else 1.0
    left = 1.0 - progress if optimizer.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optimizer.final_lr_scale + (1.0 - optimizer.final_lr_scale) * left


def penalty_scale(step: int, loss: LossConfig) -> float:
    """Factor on the gradient penalty in step `step` (from 0): its weight times n on every n-th step, else 0.

    StyleGAN2 (Karras et al. 2020, sec. 4), lazy regularisation: the expected weight per step stays `penalty_weight`.
    """
    if loss.penalty == "none" or step % loss.penalty_every:
        return 0.0
    return loss.penalty_weight * loss.penalty_every


def ema_decay(images: int, batch: int, ema: EmaConfig) -> float:
    """Share of the old average that a step of `batch` images keeps, when `images` were seen before it; in 0..1.

    EDM (Karras et al. 2022, sec. F.2): half-life in images, at most `ramp` of the images seen so far, so that the
    random first weights are forgotten; the very first step copies. `ramp` 0 switches the ramp off.
    """
    half_life = min(ema.half_life_images, ema.ramp * images) if ema.ramp else float(ema.half_life_images)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0
