"""InceptionV3 with the weights that FID is defined by, through torch-fidelity.

torch-fidelity (Apache-2.0) has the network (the TensorFlow graph of 2015 in PyTorch), TensorFlow's resizing, and the
metrics on features. It imports torchvision at the top for data sets and transforms that nothing here calls; where
torchvision is not there (its PyPI build does not import beside the CPU build of torch), names stand in for it while
torch-fidelity is imported, and go away again.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dist_t2i.errors import UserError
from dist_t2i.eval.judges import resizing
from dist_t2i.eval.judges.features import FeatureNetwork, register
from dist_t2i.eval.judges.torch_fidelity import torch_fidelity
from dist_t2i.eval.judges.weights import remedy, weights_file
from dist_t2i.utils.files import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of pt_inception-2015-12-05, which pytorch-fid and torch-fidelity share: only with it a number is called FID."""
_PUBLISHED = {
    "clean": {"fid": "FID (clean resize)", "kid": "KID (clean resize)"},
    "legacy": {"fid": "FID (legacy resize)", "kid": "KID (legacy resize)", "inception-score": "Inception Score"},
}


class Trunk(torch.nn.Module):
    """Normalised pictures [B, 3, 299, 299] to pooled features [B, 2048]: torch-fidelity's forward, without its resizing,
    so that other ways to resize (and pixels that are no whole numbers) can come before it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        children = dict(network.named_children())
        children.pop("fc")
        self.layers = torch.nn.Sequential(*children.values())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


@register("inception-clean")
def inception_clean(device: torch.device, source: str | None = None) -> FeatureNetwork:
    """InceptionV3 behind clean-fid's resizing (Parmar et al. 2022)."""
    return _inception(device, source, "clean")


@register("inception-legacy")
def inception_legacy(device: torch.device, source: str | None = None) -> FeatureNetwork:
    """InceptionV3 behind the resizing of the TensorFlow graph, as the original FID and Inception Score have it."""
    return _inception(device, source, "legacy")


def _inception(device: torch.device, source: str | None, resize: str) -> FeatureNetwork:
    path = weights_file("inception", source, URL)
    sha256 = file_sha256(path)
    network = _kept(path, sha256)
    published = _PUBLISHED[resize] if sha256 == FID_SHA256 else {}
    label = "InceptionV3" if published else f"InceptionV3, weights sha256 {sha256[:8]}…"
    return FeatureNetwork(
        f"{label}, {resize} resize",
        299,
        2048,
        sha256,
        Trunk(network).to(device),
        mean=128.0,
        std=128.0,
        resizer=resizing.clean if resize == "clean" else resizing.legacy,
        published=published,
        classifier=network.fc.weight.detach().clone(),
        scaled=False,
    )


@functools.lru_cache(maxsize=1)
def _kept(path: Path, sha256: str) -> nn.Module:
    """The two ways to resize share one network."""
    return load_network(path)


def load_network(path: Path) -> nn.Module:
    """torch-fidelity's InceptionV3 with the weights in a .pth or .safetensors file; no pickled code runs.

    Raises UserError when the file is none, or of another network.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        plain = io.BytesIO()  # torch-fidelity would unpickle the file itself, code and all
        torch.save(state, plain)
        plain.seek(0)
        module = torch_fidelity("feature_extractor_inceptionv3")
        network: nn.Module = module.FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=plain
        )
        return network
    except UserError:
        raise
    except Exception as error:  # what torch.load, safetensors and load_state_dict raise is many things
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path}: not the weights of InceptionV3 ({reason}); {remedy('inception')}") from None
