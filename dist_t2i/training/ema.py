"""The moving average of the weights of the generator and of a shared text encoder, used to generate pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_t2i.config.sections import EmaConfig
from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.models.networks import Networks


class Average:
    """The fp32 averages of the weights of the generator side and of a shared text encoder. Only rank 0 stores averages.

    Build this object before the engines, because ZeRO stage 3 splits the parameters. `batch` is the global batch in
    images.
    """

    def __init__(self, networks: Networks, config: EmaConfig, batch: int, device: torch.device) -> None:
        self._config, self._batch, self._device, self._frozen = config, batch, device, networks.frozen
        averaged: dict[str, nn.Module | None] = {"generator": networks.generator, "text": networks.text}
        self._modules = {  # engine's name -> average of the engine's weights
            name: copy.deepcopy(module).to(device, torch.float32).requires_grad_(False).eval()
            for name, module in averaged.items()
            if module is not None and dist.get_rank() == 0
        }

    def update(self, engines: Iterable[NetworkEngine], images: int) -> None:
        """Update after the step that ends at `images` seen. Collective: ZeRO stage 3 gathers weights on every rank."""
        decay = ema_decay(self._batch, images, self._config.half_life_images, self._config.ramp)
        for engine in engines:
            if engine.name in ("generator", "text"):
                with engine.gathered() as weights:
                    if engine.name in self._modules:
                        update_ema(dict(self._modules[engine.name].named_parameters()), weights, decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by name (`generator.*`, `text_g.*` or `text.*`) as fp32 CPU tensors; empty except on rank 0."""
        modules = self._modules.values()
        return {name: p.to("cpu", copy=True) for module in modules for name, p in module.named_parameters()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages that `state` returned, on rank 0."""
        for module in self._modules.values():
            for name, parameter in module.named_parameters():
                parameter.copy_(state[name])

    @torch.no_grad()
    def generate(
        self, noise: Tensor, condition_noise: Tensor, tokens: Tensor, lengths: Tensor, *pictures: Tensor
    ) -> Tensor:
        """Pictures [B, 3, H, W] for B captions, on the CPU; rank 0 only. Inputs: see `GeneratorSide.forward`."""
        tokens, lengths = tokens.to(self._device), lengths.to(self._device)
        encoder = self._modules.get("text", self._frozen)
        text = encoder(tokens, lengths) if encoder is not None else None
        noise, condition, *sources = (x.to(self._device) for x in (noise, condition_noise, *pictures))
        return self._modules["generator"](noise, condition, tokens, lengths, text, *sources).images.cpu()


def ema_decay(step_images: int, images: int, half_life_images: float, ramp: float) -> float:
    """The factor that multiplies the old average in a step of `step_images` that ends at `images` seen.

    The factor is 0.5 ** (step_images / half_life), so after the ramp the average does not depend on the batch size.
    Early in training the half-life is at most `ramp * images` (EDM, appendix F.2), so that the average forgets the
    initial weights. A ramp of 0 disables this limit. With a half-life of 0 the average equals the weights.
    """
    half_life = min(half_life_images, ramp * images) if ramp > 0 else half_life_images
    return 0.5 ** (step_images / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place. The average should be in fp32, because the update
    is computed in the dtype of the average.

    Tensors without a floating-point dtype are copied. Raises KeyError if `weights` lacks a name in `average`.
    """
    for name, mean in average.items():
        value = weights[name].to(mean.device)
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)
