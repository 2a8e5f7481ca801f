"""The moving average of the generator and of the encoder that it reads: what pictures are made with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_t2i.config.sections import EmaConfig
from dist_t2i.models.generator import Generated
from dist_t2i.models.networks import Networks
from dist_t2i.training.gan import Gan


class Average:
    """fp32 copies of the generator side and of a shared encoder, kept by rank 0 alone.

    Made before the engines are: at ZeRO stage 3 these take the parameters apart.
    """

    def __init__(self, networks: Networks, config: EmaConfig, device: torch.device):
        self._config = config
        self._frozen = networks.frozen
        self._main = dist.get_rank() == 0
        self._generator = self._copy(networks.generator, device)
        self._text = self._copy(networks.text, device)

    def _copy(self, module: nn.Module | None, device: torch.device) -> nn.Module | None:
        if module is None or not self._main:
            return None
        return copy.deepcopy(module).to(device, torch.float32).requires_grad_(False).eval()

    def update(self, gan: Gan, images: int) -> None:
        """After the step that ends at `images` seen. Collective: ZeRO-3 gathers the weights."""
        decay = ema_decay(gan.config.train.global_batch, images, self._config.half_life_images, self._config.ramp)
        for engine, module in ((gan.generator, self._generator), (gan.text, self._text)):
            if engine is None:
                continue
            with engine.gathered() as weights:
                if module is not None:
                    update_ema(dict(module.named_parameters()), weights, decay)

    def state(self) -> dict[str, Tensor]:
        """fp32 CPU tensors by name on rank 0 (`generator.*`, `text_g.*` or `text.*`); empty elsewhere."""
        modules = [m for m in (self._generator, self._text) if m is not None]
        return {name: p.to("cpu", copy=True) for module in modules for name, p in module.named_parameters()}

    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave, on rank 0."""
        for module in (self._generator, self._text):
            if module is not None:
                for name, parameter in module.named_parameters():
                    parameter.copy_(state[name])

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, lengths: Tensor, noise: Tensor, condition_noise: Tensor, pictures: Tensor | None = None
    ) -> Generated:
        """Pictures [B, 3, H, W] for B captions; rank 0 only. Shapes as `GeneratorSide.forward` has them."""
        encoder = self._text or self._frozen
        text = encoder(tokens, lengths) if encoder is not None else None
        return self._generator(noise, condition_noise, tokens, lengths, text, pictures)


def ema_decay(step_images: int, images: int, half_life_images: float, ramp: float) -> float:
    """The factor on the old average for a step of `step_images` that ends at `images` images seen.

    0.5 ** (step_images / half_life), the half-life being at most `ramp * images` early on (EDM, appendix F.2), so that
    an early average is not the initial weights; ramp 0 turns that off. Independent of how images are cut into steps
    once the ramp has passed. A half-life of 0 follows the weights exactly.
    """
    half_life = min(half_life_images, ramp * images) if ramp > 0 else half_life_images
    return 0.5 ** (step_images / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place, in the average's dtype (keep it fp32).

    Raises KeyError when `weights` lacks one of the average's names. Buffers that are not floating point are copied.
    """
    for name, mean in average.items():
        value = weights[name].to(mean.device)
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)
