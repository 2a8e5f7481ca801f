"""CLIP (Radford et al. 2021) by `transformers`, from a folder in the Hugging Face layout or a name on the hub.

Weights are read from safetensors, or from a .bin file; code in a .bin file is not run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_t2i.errors import UserError
from dist_t2i.eval.judges.features import FeatureNetwork
from dist_t2i.eval.judges.weights import location_of, remedy
from dist_t2i.utils.files import file_sha256

HUB = "openai/clip-vit-base-patch32"
KNOWN = {"a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f": "CLIP ViT-B/32 of OpenAI"}
"""SHA-256 of a weights file -> name of the weights. Only these weights give a score the name CLIP score."""
_FILES = ("model.safetensors", "pytorch_model.bin")
_REMEDY = remedy("clip", "FOLDER")
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32


class Vision(torch.nn.Module):
    """Maps pixels [B, 3, side, side] with values from 0 to 1 to embeddings [B, width], which are not normalized."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection
        for name, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.vision((images - self.mean) / self.std).pooler_output)


@torch.inference_mode()
def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Maps texts to embeddings [N, width] on the CPU. Texts are truncated to CLIP's number of tokens (77)."""
    limit, rows = model.config.text_config.max_position_embeddings, [torch.empty(0, model.config.projection_dim)]
    # All texts are padded to the limit, so that every batch has the same number of tokens.
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": limit, "return_tensors": "pt"}
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(list(texts[start : start + _BATCH]), **options).to(model.device)
        pooled = model.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output
        rows.append(model.text_projection(pooled).float().cpu())
    return torch.cat(rows)


def clip(device: torch.device, weights: str | None = None) -> FeatureNetwork:
    """CLIP: by default OpenAI's ViT-B/32, which published CLIP scores and R-precisions use. Raises UserError."""
    try:
        import transformers
    except ImportError as problem:
        ways = "run: pip install 'dist_t2i[clip]', or skip these metrics with --without clip"
        raise UserError(f"transformers, which loads CLIP, cannot be imported ({problem}); {ways}") from None
    folder = _folder(location_of("clip", weights) or HUB)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} contains no {' or '.join(_FILES)}; {_REMEDY}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: not a CLIP model ({reason}); {_REMEDY}") from None
    model, side, width = model.to(device), model.config.vision_config.image_size, model.config.projection_dim
    sha256 = file_sha256(file)
    known = KNOWN.get(sha256, "")
    published = {"clip-score": f"CLIP score ({known})", "r-precision": f"R-precision ({known})"} if known else {}
    name = known or f"a CLIP network, weights sha256 {sha256[:8]}…"
    embed = functools.partial(embed_texts, model, tokenizer)
    options: dict[str, Any] = {"mean": 0.0, "std": 255.0, "published": published, "embed_texts": embed}
    return FeatureNetwork(name, side, width, sha256, Vision(model).to(device), **options)


def _folder(location: str) -> Path:
    """`location` itself if it is a folder, otherwise the cached download of the model `location` on the hub."""
    if Path(location).is_dir():
        return Path(location)
    if location.count("/") != 1 or location.startswith((".", "/", "~")):
        raise UserError(f"{location} is neither a folder nor a name on the Hugging Face hub; {_REMEDY}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(location, allow_patterns=["*.json", "merges.txt", *_FILES]))
    except Exception as error:  # the hub's client raises errors of many types
        problem = f"{location} cannot be downloaded from the Hugging Face hub ({' '.join(str(error).split())[:160]})"
        raise UserError(f"{problem}; download its folder on another machine and {_REMEDY}") from None
