"""The training step of DF-GAN, for comparison, written from the paper (Tao et al. 2022, "DF-GAN: A Simple and Effective
Baseline for Text-to-Image Synthesis", CVPR).

At 64 px and a width of 32, the generator has 4.87M parameters and the discriminator has 3.44M. The text encoder is
pretrained and frozen, so a step gets sentence vectors. Steps use fp32 and Adam. A step first updates the discriminator.
The loss is the hinge loss on real pictures, real pictures with wrong captions, and fakes, plus the matching-aware
penalty (eq. 2) on the real pictures in every step. The step then updates the generator, with another pass through the
discriminator. `tools/bench/dfgan_train.py` trains with this step on a set, and `tools/bench/step.py --peer` measures
the time of the step.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench.common import now

WIDTH, NOISE, SENTENCE = 32, 100, 256
PENALTY_WEIGHT, PENALTY_POWER = 2.0, 6
SLOPE = 0.2


def widths(size: int) -> list[int]:
    """Channels at `size`, `size` / 2, ..., 4 pixels."""
    return [WIDTH * min(2**scale, 8) for scale in range(size.bit_length() - 2)]


class Affine(nn.Module):
    """Scales and shifts channels by two-layer perceptrons of the condition (sec. 3.3)."""

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.scale, self.shift = (
            nn.Sequential(nn.Linear(condition, channels), nn.ReLU(), nn.Linear(channels, channels)) for _ in range(2)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.scale(condition)[:, :, None, None] * x + self.shift(condition)[:, :, None, None]


class UpBlock(nn.Module):
    """Doubles the resolution: two affine layers before each of two convolutions, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, condition: int):
        super().__init__()
        self.affines = nn.ModuleList(Affine(c, condition) for c in (inputs, inputs, outputs, outputs))
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = y = F.interpolate(x, scale_factor=2)
        for conv, affines in ((self.conv1, self.affines[:2]), (self.conv2, self.affines[2:])):
            for affine in affines:
                y = F.leaky_relu(affine(y, condition), SLOPE)
            y = conv(y)
        return self.shortcut(x) + y


class PeerGenerator(nn.Module):
    """noise [B, 100], sentence [B, E] -> pictures [B, 3, H, W] in [-1, 1]."""

    def __init__(self, size: int, sentence: int = SENTENCE):
        super().__init__()
        channels = widths(size)[::-1]
        self.first = nn.Linear(NOISE, channels[0] * 16)
        self.blocks = nn.ModuleList(UpBlock(a, b, NOISE + sentence) for a, b in pairwise(channels))
        self.last = nn.Conv2d(channels[-1], 3, 3, 1, 1)

    def forward(self, noise: Tensor, sentence: Tensor) -> Tensor:
        condition = torch.cat([noise, sentence], dim=1)
        x = self.first(noise).view(len(noise), -1, 4, 4)
        for block in self.blocks:
            x = block(x, condition)
        return torch.tanh(self.last(F.leaky_relu(x, SLOPE)))


class DownBlock(nn.Module):
    """Halves the resolution: a 4x4 and a 3x3 convolution with a learned weight, and a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), SLOPE)), SLOPE)
        return F.avg_pool2d(self.shortcut(x), 2) + self.weight * y


class PeerDiscriminator(nn.Module):
    """pictures [B, 3, H, W], sentence [B, E] -> logits [B]."""

    def __init__(self, size: int, sentence: int = SENTENCE):
        super().__init__()
        channels = widths(size)
        self.first = nn.Conv2d(3, channels[0], 3, 1, 1)
        self.blocks = nn.Sequential(*(DownBlock(a, b) for a, b in pairwise(channels)))
        self.joint = nn.Conv2d(channels[-1] + sentence, 2 * WIDTH, 3, 1, 1, bias=False)
        self.logit = nn.Conv2d(2 * WIDTH, 1, 4, bias=False)

    def features(self, images: Tensor) -> Tensor:
        return self.blocks(self.first(images))

    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:
        tiled = sentence[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.logit(F.leaky_relu(self.joint(torch.cat([features, tiled], dim=1)), SLOPE)).flatten()


class Peer:
    """Both networks, their optimizers, and the step, in one process.

    `rate` multiplies the learning rates of the paper (sec. 4), 1e-4 for the generator and 4e-4 for the discriminator.
    """

    def __init__(self, size: int, device: torch.device, sentence: int = SENTENCE, rate: float = 1.0):
        self.device = device
        self.generator = PeerGenerator(size, sentence).to(device)
        self.discriminator = PeerDiscriminator(size, sentence).to(device)
        self._optimizer_g = torch.optim.Adam(self.generator.parameters(), 1e-4 * rate, betas=(0.0, 0.9))
        self._optimizer_d = torch.optim.Adam(self.discriminator.parameters(), 4e-4 * rate, betas=(0.0, 0.9))

    @property
    def parameters(self) -> dict[str, int]:
        """Network -> number of weights."""
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}

    def step(self, real: Tensor, sentence: Tensor, noise: Tensor) -> None:
        """Updates both networks: real [B, 3, H, W] in [-1, 1] with their sentences [B, E]; noise [B, 100]."""
        d = self.discriminator
        real, sentence = real.detach().requires_grad_(), sentence.detach().requires_grad_()
        features = d.features(real)
        logits = d.logits(features, sentence)
        fake = self.generator(noise, sentence.detach())
        negatives = d.logits(features[:-1], sentence[1:]), d.logits(d.features(fake.detach()), sentence)
        negative_loss = torch.stack([F.relu(1 + x).mean() for x in negatives]).sum() / 2
        penalty = self._penalty(logits, real, sentence)
        self._update(self._optimizer_d, F.relu(1 - logits).mean() + negative_loss + penalty)
        self._update(self._optimizer_g, -d.logits(d.features(fake), sentence.detach()).mean())

    def _penalty(self, logits: Tensor, real: Tensor, sentence: Tensor) -> Tensor:
        gradients = torch.autograd.grad(logits.sum(), (real, sentence), create_graph=True)
        norm = torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)
        return PENALTY_WEIGHT * norm.pow(PENALTY_POWER).mean()

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        self._optimizer_g.zero_grad()
        self._optimizer_d.zero_grad()
        loss.backward()
        optimizer.step()


class TimedPeer:
    """The step of `Peer` on synthetic pictures and sentences, to measure its time."""

    def __init__(self, size: int, batch: int, device: torch.device):
        self.peer = Peer(size, device)
        self.real = torch.rand(batch, 3, size, size, device=device) * 2 - 1
        self.sentence = torch.randn(batch, SENTENCE, device=device)

    def run(self, steps: int) -> dict[str, float]:
        """Runs `steps` steps; returns the seconds per step as `step`."""
        device = self.peer.device
        begin = now(device)
        for _ in range(steps):
            self.peer.step(self.real, self.sentence, torch.randn(len(self.real), NOISE, device=device))
        return {"step": (now(device) - begin) / steps}
