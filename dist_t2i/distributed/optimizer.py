"""AdamW, and Muon for some groups of parameters, over full parameters or over ZeRO's pieces of parameters.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the step of a matrix by
the nearest matrix whose singular values are all equal. Muon thus gives rare and frequent directions of the gradient the
same weight. A convolution's kernel is treated as a matrix [outputs, all other dimensions]. The step is scaled to the
root mean square of AdamW's step (Liu et al. 2025, "Muon is scalable for LLM training", sec. 2.2), so that Muon can use
AdamW's learning rate. Singular values require the full matrix, but under ZeRO a rank holds only pieces of matrices
(`Layout`). Each step therefore combines the pieces of all ranks.
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
"""Coefficients of x, x^3 and x^5 (Jordan et al. 2024). Iteration maps singular values in (0, 1] to about [0.7, 1.2]."""
REPEATS = (3, 2)
"""The numbers of Newton-Schulz iterations in the first and in the second part. The second part recomputes X X', whose
small values lose digits in the first part."""
RMS = 0.2
"""Root mean square of a step at learning rate 1, close to AdamW's (Liu et al. 2025, eq. 4)."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that a flat tensor of this rank holds."""

    shape: torch.Size  # of the full parameter
    first: int  # index of the piece's first number in the flattened full parameter
    offset: int  # index of the piece's first number in the flat tensor
    size: int  # count of numbers; 0 if the flat tensor holds nothing of this parameter


@dataclass(frozen=True)
class Layout:
    """The pieces of parameters in one flat tensor. The order of the parameters is equal on all ranks."""

    pieces: tuple[Piece, ...]
    spread: bool  # whether other ranks hold the rest of the parameters
    device: torch.device  # on which ranks exchange tensors and multiply matrices

    def full(self, flat: Tensor) -> list[Tensor]:
        """The full parameters, flattened [numel], from the `flat` tensors [N] of all ranks. Collective if `spread`."""
        sizes = [piece.shape.numel() for piece in self.pieces]
        buffer = torch.zeros(sum(sizes), device=self.device, dtype=flat.dtype)
        parts = list(buffer.split(sizes))
        for part, piece in zip(parts, self.pieces, strict=True):
            part[piece.first :][: piece.size].copy_(flat[piece.offset :][: piece.size])
        if self.spread:  # each number is zero on all ranks but one, so the sums are exact
            dist.all_reduce(buffer)
        return parts


def full_parameter(parameter: Tensor) -> Layout:
    """The layout of a tensor that is one full parameter."""
    return Layout((Piece(parameter.shape, 0, 0, parameter.numel()),), False, parameter.device)


def orthogonalised(matrix: Tensor) -> Tensor:
    """fp32 [M, N] -> [M, N] with equal singular vectors and singular values near 1; a zero matrix stays zero.

    The root mean square of the result is near 1 / sqrt(max(M, N)). Newton-Schulz iterations use only matrix products.
    """
    # X [m, n] has m <= n, so that X X' is smaller than X' X. X is scaled so that all singular values are at most 1.
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-30)
    for repeats in REPEATS:
        # One iteration is X <- P X with P = a I + b G + c G^2 and G = X X' [m, m] (Jordan et al. 2024). The next
        # iteration has G <- P G P, so the factors P of a part are first multiplied with each other, as [m, m] matrices.
        # Therefore X [m, n] occurs in four products, not in ten.
        gram = x @ x.T
        factors = factor = _polynomial(gram)
        for _ in range(repeats - 1):
            gram = factor @ gram @ factor
            factor = _polynomial(gram)
            factors = factor @ factors
        x = factors @ x
    return x if wide else x.T


def _polynomial(gram: Tensor) -> Tensor:
    """a I + b G + c G^2 for G [m, m]."""
    a, b, c = QUINTIC
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


class AdamWAndMuon(torch.optim.AdamW):
    """AdamW, except that Muon updates the groups with `muon` true. Muon uses `momentum`, and `lr` and `weight_decay` of
    the group.

    The state of a Muon group is `exp_avg`, its momentum, in the layout of the group's tensors. `layout_of` maps a
    tensor to its layout, by default that of a full parameter. Spread layouts make a step collective.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self.layout_of: Callable[[Tensor], Layout] = full_parameter

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

        # Momentum M <- mu M + (1 - mu) G, with Nesterov's look ahead (1 - mu) G + mu M, and decoupled weight decay.
        average = state["exp_avg"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(average, self.momentum).flatten()
        flat.mul_(1 - rate * decay)

        # For each parameter: gather the full matrix [M, N] from all ranks, orthogonalize it, and apply this rank's
        # piece of the result. The factor sqrt(max(M, N)) gives the step the root mean square `RMS` (Liu et al., eq. 4).
        layout, target = self.layout_of(flat), flat.view(-1)
        for piece, full in zip(layout.pieces, layout.full(ahead), strict=True):
            if piece.size:
                matrix = full.view(piece.shape[0], -1)
                step = orthogonalised(matrix).flatten()[piece.first :][: piece.size].to(target.device)
                target[piece.offset :][: piece.size].add_(step, alpha=-rate * RMS * max(matrix.shape) ** 0.5)


def build_optimizer(
    module: nn.Module, options: OptimizerConfig, rate: float, scales: Mapping[str, float]
) -> AdamWAndMuon:
    """The optimizer of a network at peak learning rate `rate`, with one group for each direct child of `module`.

    A group has the child's `name` and, from `scales`, the `scale` of its learning rate (default: 1). If
    `options.generator_matrices` is "muon", Muon updates a second group, the matrices and kernels of the child
    `generator`.
    """
    groups = []
    for name, child in module.named_children():
        uses_muon = name == "generator" and options.generator_matrices == "muon"
        for muon in (False, True):
            parameters = [p for p in child.parameters() if (uses_muon and p.ndim > 1) == muon]
            if parameters:
                groups.append({"params": parameters, "scale": scales.get(name, 1.0), "name": name, "muon": muon})
    betas, decay = (options.beta1, options.beta2), options.weight_decay
    adamw = {"lr": rate, "betas": betas, "eps": options.epsilon, "weight_decay": decay, "fused": True}
    return AdamWAndMuon(groups, momentum=options.muon_momentum, **adamw)
