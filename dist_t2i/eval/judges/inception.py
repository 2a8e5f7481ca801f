"""InceptionV3 with the weights that define FID, by torch-fidelity.

The package torch-fidelity (Apache-2.0) contains the network (the TensorFlow graph of 2015 in PyTorch), TensorFlow's
resizing, and the metrics on features. Its data sets and transforms, unused here, import torchvision.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_t2i.errors import UserError
from dist_t2i.eval.judges import resizing
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.judges.torch_fidelity import torch_fidelity
from dist_t2i.eval.judges.weights import remedy, weights_file
from dist_t2i.utils.files import file_sha256

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Hash of pt_inception-2015-12-05, the weights that both pytorch-fid and torch-fidelity use. Only scores from these
weights are called FID."""
_PUBLISHED = {
    "clean": {"fid": "FID (clean resize)", "kid": "KID (clean resize)"},
    "legacy": {"fid": "FID (legacy resize)", "kid": "KID (legacy resize)", "inception-score": "Inception Score"},
}


class Trunk(torch.nn.Module):
    """Maps normalized pictures [B, 3, 299, 299] to pooled features [B, 2048].

    Equals torch-fidelity's forward without the resizing, so that other resizing and fractional pixels are possible.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(layer for name, layer in network.named_children() if name != "fc"))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


def inception(device: torch.device, weights: str | None, resize: str) -> FeatureNetwork:
    """InceptionV3 after clean-fid's resizing (`clean`, Parmar et al. 2022) or TensorFlow's (`legacy`)."""
    path = weights_file("inception", weights, URL)
    sha256 = file_sha256(path)
    network = load_network(path, sha256)
    published = _PUBLISHED[resize] if sha256 == FID_SHA256 else {}
    label = "InceptionV3" if published else f"InceptionV3, weights sha256 {sha256[:8]}…"
    options: dict[str, Any] = {
        "resizer": resizing.clean if resize == "clean" else resizing.legacy,
        "published": published,
    }
    options |= {"mean": 128.0, "std": 128.0, "classifier": network.fc.weight.detach().clone(), "scaled": False}
    return FeatureNetwork(f"{label}, {resize} resize", 299, 2048, sha256, Trunk(network).to(device), **options)


@functools.lru_cache(maxsize=1)  # both ways to resize share one network
def load_network(path: Path, sha256: str = "") -> Any:
    """torch-fidelity's InceptionV3 with weights from .pth or .safetensors; runs no pickled code. Raises UserError."""
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        plain = io.BytesIO()  # torch-fidelity must not unpickle the original file, because unpickling can run code
        torch.save(state, plain)
        plain.seek(0)
        module = torch_fidelity("feature_extractor_inceptionv3")
        return module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=plain)
    except UserError:
        raise
    except Exception as error:  # torch.load, safetensors and load_state_dict raise errors of many types
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path}: not the weights of InceptionV3 ({reason}); {remedy('inception')}") from None
