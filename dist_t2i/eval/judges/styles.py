"""The strength of a picture's color, which tells OpenMoji's colored pictures from those of black lines.

The strength is the mean chroma (largest minus smallest channel, 0 to 1) of the 2% of the pixels that have the most
chroma. The mean over all pixels would also depend on how much of a picture is colored, which differs widely between
pictures. A mixture of both styles has a strength in proportion to the share of color. `contents/style_scores.py` compares the
strength of a picture with that of the real colored picture of its caption.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from dist_t2i.eval.judges.features import FeatureNetwork

SIDE, SHARE = 32, 0.02


class Strength(nn.Module):
    """Pictures [B, 3, SIDE, SIDE] in [0, 1] -> strength [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)  # gives the network a device

    def forward(self, images: Tensor) -> Tensor:
        chroma = (images.amax(1) - images.amin(1)).flatten(1) * self.scale
        return chroma.topk(round(SHARE * SIDE**2)).values.mean(1, keepdim=True)


def styles(device: torch.device, weights: str | None = None) -> FeatureNetwork:
    """The strength of color as a network with one feature; it has no weights, so its hash is that of the rule."""
    sha256 = hashlib.sha256(f"chroma {SIDE} {SHARE}".encode()).hexdigest()
    return FeatureNetwork("strength of color", SIDE, 1, sha256, Strength().to(device), mean=0.0, std=255.0)
