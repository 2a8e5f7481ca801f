"""AdamW, and Muon for the groups of parameters that ask for it, over whole parameters or over ZeRO's pieces of them.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the step of a matrix, its
momentum with Nesterov's look ahead, by the nearest matrix whose singular values are all alike: directions that the
gradient rarely takes count as much as the usual ones. A convolution's kernel is a matrix of its outputs by all the rest.
The step is scaled to the root mean square that AdamW's has (Liu et al. 2025, "Muon is scalable for LLM training", sec.
2.2), so that one learning rate serves both.

A singular value belongs to a whole matrix, and under ZeRO a rank holds pieces: `Layout` says which, and the steps are put
together from all ranks' pieces for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_t2i.config.sections import OptimizerConfig

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 (Jordan et al. 2024): repeated, they bring singular values from (0, 1] to about [.7, 1.2]."""
REPEATS = (3, 2)
"""How often, in two parts: the second begins with a fresh X X', since the small values of the first lose digits."""
RMS = 0.2
"""Root mean square of a step at learning rate 1, about AdamW's (Liu et al. 2025, eq. 4)."""


@dataclass(frozen=True)
class Piece:
    """What a flat tensor of this rank holds of one parameter."""

    shape: torch.Size
    """Of the whole parameter."""
    first: int
    """Where in the whole parameter, flattened, the piece begins."""
    offset: int
    """Where in the flat tensor it lies."""
    size: int
    """How many numbers it has; 0 where the flat tensor has none of this parameter."""


@dataclass(frozen=True)
class Layout:
    """The parameters of a tensor that the optimizer is given: the same ones in the same order on every rank."""

    pieces: tuple[Piece, ...]
    spread: bool
    """Whether other ranks hold the rest of them."""
    device: torch.device
    """Where the ranks can exchange tensors, and where matrices are multiplied."""

    def whole(self, flat: Tensor) -> list[Tensor]:
        """Every parameter's numbers, whole [numel], from what this rank's `flat` [N] and the others' hold. Collective."""
        sizes = [piece.shape.numel() for piece in self.pieces]
        buffer = torch.zeros(sum(sizes), device=self.device, dtype=flat.dtype)
        parts = list(buffer.split(sizes))
        for part, piece in zip(parts, self.pieces, strict=True):
            part[piece.first :][: piece.size].copy_(flat[piece.offset :][: piece.size])
        if self.spread:  # the others' numbers are zeros here, so the sums are exact
            dist.all_reduce(buffer)
        return parts


def whole_parameter(parameter: Tensor) -> Layout:
    """The layout of a tensor that is one parameter, whole."""
    return Layout((Piece(parameter.shape, 0, 0, parameter.numel()),), False, parameter.device)


def orthogonalised(matrix: Tensor) -> Tensor:
    """fp32 [M, N] -> [M, N]: the same singular vectors, all singular values near 1; of root mean square near 1 / sqrt(max(M, N)).

    By Newton-Schulz iterations, products of matrices alone. Each multiplies X by a polynomial of X X', so those of a part are
    multiplied up in the space of the shorter side first, and X takes part in four products instead of ten. Those of zeros are
    zeros.
    """
    a, b, c = QUINTIC
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-30)
    for repeats in REPEATS:
        gram, factor, factors = x @ x.T, None, None
        for _ in range(repeats):
            gram = gram if factor is None else factor @ gram @ factor
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal().add_(a)
            factors = factor if factors is None else factor @ factors
        x = factors @ x
    return x if wide else x.T


class AdamWAndMuon(torch.optim.AdamW):
    """AdamW; groups with `muon` true take Muon's step instead, at the same `lr` and `weight_decay`, with the momentum `momentum`.

    A Muon group's state is `exp_avg` alone, the momentum, in the layout of the group's tensors. These are whole parameters,
    unless `layout_of` is set to what says which pieces they hold; a step is collective then where others hold the rest.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self.layout_of: Callable[[Tensor], Layout] = whole_parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    self._muon(flat, flat.grad, group["lr"], group["weight_decay"])

    def _muon(self, flat: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[flat]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat)}
        state["step"] += 1
        average = state["exp_avg"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(average, self.momentum).flatten()
        flat.mul_(1 - rate * decay)
        layout, target = self.layout_of(flat), flat.view(-1)
        for piece, whole in zip(layout.pieces, layout.whole(ahead), strict=True):
            if piece.size:
                matrix = whole.view(piece.shape[0], -1)
                step = orthogonalised(matrix).flatten()[piece.first :][: piece.size].to(target.device)
                target[piece.offset :][: piece.size].add_(step, alpha=-rate * RMS * max(matrix.shape) ** 0.5)


def build_optimizer(
    module: nn.Module, options: OptimizerConfig, rate: float, scales: Mapping[str, float]
) -> AdamWAndMuon:
    """The optimizer of a network whose direct children are the generator, the discriminator, text encoders and the like.

    Each child has a group of its own, with its `name` and the `scale` of its learning rate (`scales`, else 1); where
    `options.generator_matrices` is "muon", the matrices and kernels of the child `generator` are another one, Muon's.
    """
    groups = []
    for name, child in module.named_children():
        of_muon = [
            name == "generator" and options.generator_matrices == "muon" and p.ndim > 1 for p in child.parameters()
        ]
        for muon in (False, True):
            parameters = [p for p, its in zip(child.parameters(), of_muon, strict=True) if its == muon]
            if parameters:
                groups.append({"params": parameters, "scale": scales.get(name, 1.0), "name": name, "muon": muon})
    return AdamWAndMuon(
        groups,
        momentum=options.muon_momentum,
        lr=rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        fused=True,
    )
