"""The moving average of the generator and of the encoder that it reads: what pictures are made with."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_t2i.config.sections import EmaConfig
from dist_t2i.gan import Gan
from dist_t2i.models.ema import ema_decay, update_ema
from dist_t2i.models.generator import Generated
from dist_t2i.models.networks import Networks


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
