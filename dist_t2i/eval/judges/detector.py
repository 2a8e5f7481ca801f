"""A detector of the objects and the background of rendered scenes, and its training.

The detector divides a picture into 8 x 8 cells. It predicts for each cell whether an object has its center there, and
the object's color, shape, exact position and radius (a center as a point: Zhou et al. 2019, "Objects as Points",
sec. 3). So it can find any number of objects, not only the one or two that scenes have. It also predicts the kind and
the hue of the background.

It is trained on scenes of a sequence that sets do not use, with all combinations of attributes, also those that are
held out of training. `attributes.py` keeps the weights under a hash of this module's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.data import scenes
from dist_t2i.eval.judges.resizing import rounded_bicubic
from dist_t2i.utils.seeds import Purpose, mix

COLORS, SHAPES, KINDS = tuple(scenes.COLORS), tuple(scenes.SYMMETRY), scenes.BACKGROUNDS
SIDE, CELLS = 32, 8
OBJECTS = 4
"""The number of objects that are reported, those with the highest scores."""
WIDTH = 6 * OBJECTS + 2
LARGEST = 64
"""Scenes for training are rendered at the model's size, but at this size for larger models: the detector shrinks pictures
to SIDE anyway."""
SCENES, STEPS, BATCH, RATE = 24_000, 2_400, 64, 4e-3
SEED = mix(0, Purpose.SCENE_CLASSIFIER)


class Detector(nn.Module):
    """Pictures [B, 3, SIDE, SIDE] in [-1, 1] -> features [B, WIDTH], which `Shown.of` reads.

    `maps` returns the predictions before decoding: cells [B, K, CELLS, CELLS] and the background's [B, 6].
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_convolution(3, 16), _convolution(16, 32, 2), _convolution(32, 32))
        self.coarse = nn.Sequential(_convolution(32, 64, 2), *(_Residual(64) for _ in range(3)))
        self.cells = nn.Conv2d(64, 4 + len(COLORS) + len(SHAPES), 1)
        self.background = nn.Sequential(nn.Linear(160, 64), nn.ReLU(), nn.Linear(64, len(KINDS) + 2))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(images)
        coarse = self.coarse(fine)
        pooled = torch.cat([fine.mean((2, 3)), coarse.mean((2, 3)), coarse.amax((2, 3))], 1)
        return self.cells(coarse), self.background(pooled)

    def forward(self, images: Tensor) -> Tensor:
        cells, background = self.maps(images)
        presence = cells[:, 0].sigmoid()
        peak = F.max_pool2d(presence[:, None], 3, 1, 1)[:, 0] == presence
        score = 9 * F.avg_pool2d(presence[:, None], 3, 1, 1)[:, 0] * peak  # neighbors share an object on their border
        score, cell = score.flatten(1).topk(OBJECTS)
        x, y, radius = geometry(cells[:, 1:4])
        color, shape = (part.argmax(1) for part in cells[:, 4:].split([len(COLORS), len(SHAPES)], 1))
        parts = [part.flatten(1).gather(1, cell) for part in (x, y, radius, color, shape)]
        slots = torch.stack([score, *(part.float() for part in parts)], 2).flatten(1)
        kind, (cos, sin) = background[:, :-2].argmax(1), background[:, -2:].unbind(1)
        hue = (torch.atan2(sin, cos) / (2 * math.pi)) % 1
        return torch.cat([slots, kind[:, None].float(), hue[:, None]], 1)


def geometry(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position and radius [B, CELLS, CELLS] that each cell predicts, from maps [B, 3, CELLS, CELLS]."""
    middles = (torch.arange(CELLS, device=maps.device) + 0.5) / CELLS
    return middles + maps[:, 0] / CELLS, middles[:, None] + maps[:, 1] / CELLS, 0.2 + 0.1 * maps[:, 2]


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What N scenes hold."""

    objects: Tensor
    """float32 [N, 2, 6]: 1 or 0 (whether there is an object), x, y, radius, index of the color, index of the shape"""
    kind: Tensor
    """int64 [N]"""
    hue: Tensor
    """float32 [N]"""


def rendered(count: int, size: int, first: int = 0) -> tuple[Tensor, Labels]:
    """Scenes `first`, `first` + 1, ... of the detector's own sequence, uint8 [count, 3, size, size], and their labels."""
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    objects, kinds, hues = torch.zeros(count, 2, 6), torch.zeros(count, dtype=torch.int64), torch.zeros(count)
    for row in range(count):
        scene = scenes.sample_scene(SEED, first + row)
        images[row] = torch.from_numpy(scenes.render(scene, size)).permute(2, 0, 1)
        for slot, item in enumerate(scene.objects):
            names = COLORS.index(item.color), SHAPES.index(item.shape)
            objects[row, slot] = torch.tensor([1.0, item.x, item.y, item.radius, *names])
        kinds[row], hues[row] = KINDS.index(scene.background.kind), scene.background.hue
    return images, Labels(objects, kinds, hues)


def trained(size: int) -> Detector:
    """A detector for pictures of `size` pixels. Sets torch's random state."""
    images, labels = rendered(SCENES, min(size, LARGEST))
    return train(torch.cat([rounded_bicubic(part.float(), SIDE).byte() for part in images.split(512)]), labels)


def train(images: Tensor, labels: Labels) -> Detector:
    """Trains a detector on pictures uint8 [N, 3, SIDE, SIDE]. Sets torch's random state."""
    torch.manual_seed(SEED % 2**32)
    detector = nn.utils.convert_conv2d_weight_memory_format(Detector(), torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.15)
    order = torch.cat([torch.randperm(len(images)) for _ in range(math.ceil(STEPS * BATCH / len(images)))])
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        pixels, objects = turned(images[rows], labels.objects[rows], step % 8)
        pixels = ((pixels.float() - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)
        cells, around = detector.maps(pixels)
        loss = loss_of(cells, around, Labels(objects, labels.kind[rows], labels.hue[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # safetensors keeps contiguous tensors only
    return nn.utils.convert_conv2d_weight_memory_format(detector, torch.contiguous_format).eval()


def turned(images: Tensor, objects: Tensor, way: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] and objects [B, 2, 6] in one of the 8 mirrored and rotated ways."""
    objects = objects.clone()
    for bit, (side, coordinate) in enumerate(((-1, 1), (-2, 2))):
        if way >> bit & 1:
            images = images.flip(side)
            objects[..., coordinate] = 1 - objects[..., coordinate]
    if way & 4:
        images, objects = images.mT, objects[..., [0, 2, 1, 3, 4, 5]]
    return images, objects


def loss_of(cells: Tensor, background: Tensor, labels: Labels) -> Tensor:
    """The sum of all losses of a batch. Cells near the center of an object learn its properties."""
    presence, x, y = labels.objects[..., :3].movedim(-1, 0)[..., None, None]  # [B, 2, 1, 1] each
    middles = (torch.arange(CELLS) + 0.5) / CELLS
    away = torch.maximum((middles - x).abs(), (middles[:, None] - y).abs()) * CELLS
    holds = ((away <= 0.5) & (presence > 0)).any(1).float()
    found = F.binary_cross_entropy_with_logits(cells[:, 0], holds, reduction="none").sum((1, 2)).mean()
    batch, slot, row, column = torch.nonzero((away < 0.75) & (presence > 0), as_tuple=True)
    near = cells[batch, :, row, column]  # [K, channels]
    wanted = labels.objects[batch, slot]
    cell = torch.stack([column, row], 1) + 0.5
    targets = torch.cat([wanted[:, 1:3] * CELLS - cell, (wanted[:, 3:4] - 0.2) / 0.1], 1)
    placed = F.smooth_l1_loss(near[:, 1:4], targets)
    colors, shapes = near[:, 4:].split([len(COLORS), len(SHAPES)], 1)
    named = F.cross_entropy(colors, wanted[:, 4].long()) + F.cross_entropy(shapes, wanted[:, 5].long())
    angle = labels.hue * 2 * math.pi
    hue = (background[:, -2:] - torch.stack([angle.cos(), angle.sin()], 1)).square().sum(1).mean()
    return found + placed + named + F.cross_entropy(background[:, :-2], labels.kind) + hue
