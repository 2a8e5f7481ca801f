"""Reads trained models from run folders and from exports, and checks them.

    EXPORT/
      model.json                  format, images seen, size and SHA-256 of every other file that is read
      config.yaml                 the run's configuration, without its paths
      tokenizer.json              the tokenizer and the words of the training captions
      generator.safetensors       EMA weights: `generator.*` and `text_g.*` (text.mode=shared: `text.*`)
      discriminator.safetensors   `discriminator.*` and `text_d.*` (text.mode=shared: `text.*`)
      frozen.safetensors          text.mode=frozen only: the frozen text encoder
      README.md, samples.png, scores.json     for people; the library never reads them

Tensors are safetensors and everything else is JSON or plain YAML, so reading a model runs no code from its files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_t2i.checkpoint import store
from dist_t2i.config import files as config_files
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import UserError
from dist_t2i.models.config import TextConfig
from dist_t2i.models.frozen_text import CaptionTable, PretrainedEncoder
from dist_t2i.models.text_encoder import build_text_encoder
from dist_t2i.utils.files import file_sha256
from dist_t2i.utils.tensors import fill, read_metadata, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dist_t2i.config.sections import Config

FORMAT = 2
ABOUT = "model.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
FROZEN = "frozen.safetensors"
_REQUIRED = (CONFIG, TOKENIZER, GENERATOR, DISCRIMINATOR)


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen text encoder as data. An export stores this data, and `build` makes a module from it."""

    about: dict[str, Any]
    """JSON value: `{"kind": "table"}`, or `{"kind": "encoder", "text": {...}, "vocab_size": n, "max_tokens": n}`."""
    tensors: dict[str, Tensor]
    """A table's `vectors`, `tokens` and `lengths`, or an encoder's parameters."""
    file: Path
    """The file from which the tensors were read, for error messages."""

    def build(self) -> nn.Module:
        """A module with `.width` and forward(tokens, lengths) -> `TextEmbedding`, on the CPU. Raises UserError."""
        try:
            if self.about["kind"] == "table":
                return CaptionTable(*(self.tensors[name] for name in ("vectors", "tokens", "lengths")))
            text = TextConfig(**self.about["text"])
            with torch.device("meta"):
                encoder = build_text_encoder(text, self.about["vocab_size"], self.about["max_tokens"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.file}: not a frozen text encoder ({error}); export the model again") from None
        return PretrainedEncoder(fill(encoder, self.tensors, "", self.file)).eval()


@dataclass(frozen=True)
class ModelFiles:
    """The contents of a trained model's files."""

    folder: Path
    """Folder of the run or of the export."""
    config: Config
    tokenizer: Tokenizer
    generator: Mapping[str, Tensor]
    """EMA weights by name: `generator.*`, `text_g.*` or `text.*`, and `source.*` of a model that edits."""
    discriminator: Mapping[str, Tensor]
    """Weights by name: `discriminator.*`, `text_d.*` or `text.*`."""
    images: int
    """Images seen in training."""
    frozen: FrozenEncoder | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """The contents of an export's model.json."""
    init: Mapping[str, Any] | None = None
    """The model that the training started from (see warm_start.py); None if it started from random weights."""
    divergences: Sequence[Mapping[str, Any]] = ()
    """The divergences of a run up to the checkpoint (checkpoint/divergence.py)."""

    def sha256(self) -> str:
        """Hash of the tokenizer and of all weights: names, shapes and values, in sorted order."""
        digest = hashlib.sha256(self.tokenizer.text.encode())
        frozen = self.frozen.tensors if self.frozen else {}
        for part, tensors in (("g", self.generator), ("d", self.discriminator), ("f", frozen)):
            for name in sorted(tensors):
                digest.update(f"{part} {name} {tuple(tensors[name].shape)}".encode())
                digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_model(path: str | Path, *, ema: bool = True) -> ModelFiles:
    """Reads a run folder (its newest intact checkpoint), one checkpoint (RUN/checkpoints/images-...), or an export.

    With `ema=False`, the generator has the last weights instead of their moving average. Raises UserError.
    """
    folder = Path(path)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}; give a run folder or an exported model (a folder with {ABOUT})")
    if (folder / ABOUT).is_file():
        if not ema:
            raise UserError(f"{folder}: an exported model contains only the averaged weights; give the run's folder")
        return read_export(folder)
    if (folder / CONFIG).is_file():
        return read_run(folder, ema=ema)
    if (folder / store.STATE).is_file() and (folder.parents[1] / CONFIG).is_file():
        return read_run(folder.parents[1], ema=ema, checkpoint=folder)
    raise UserError(f"{folder} contains neither a run ({CONFIG}, checkpoints) nor an exported model ({ABOUT})")


def read_run(run: Path, *, ema: bool = True, checkpoint: Path | None = None) -> ModelFiles:
    """Reads a run's checkpoint in the folder `checkpoint` (default: the newest intact checkpoint). Raises UserError."""
    config = config_files.load(run / CONFIG)
    if checkpoint is None:
        saved = store.load_latest(run, warn=lambda message: warnings.warn(message, stacklevel=4))
    else:
        saved = store.open_checkpoint(checkpoint)
    if saved is None:
        raise UserError(f"{run} has no checkpoint yet. Stop the run, so that it saves a checkpoint, and try again")
    tokenizer = Tokenizer.load(run / TOKENIZER)
    text = saved.tensors("text") if config.text.mode == "shared" else {}
    generator = saved.tensors("ema") if ema else saved.tensors("generator") | text
    discriminator = saved.tensors("discriminator") | text
    frozen = read_frozen(config.text, tokenizer, config.data.max_tokens) if config.text.mode == "frozen" else None
    history = {"init": saved.state.get("init"), "divergences": saved.state.get("divergences", [])}
    return ModelFiles(run, config, tokenizer, generator, discriminator, saved.images, frozen, **history)


def read_export(folder: Path) -> ModelFiles:
    """Reads an exported model and compares every file with model.json. Raises a UserError that names the wrong file."""
    about = _read_about(folder)
    for name, listed in about["files"].items():
        _check_file(folder, name, listed)
    try:
        config = config_files.load(folder / CONFIG)
    except UserError as error:
        library = about.get("library", "another version of dist_t2i")
        raise UserError(f"{error}\nThis model was exported by {library}: use that version or export again.") from None
    tokenizer, path, frozen = Tokenizer.load(folder / TOKENIZER), folder / FROZEN, None
    if config.text.mode == "frozen":
        frozen = FrozenEncoder(about.get("frozen") or {}, read_tensors(path), path)
    generator, discriminator = (read_tensors(folder / name) for name in (GENERATOR, DISCRIMINATOR))
    images, init = about["images"], about.get("init")
    return ModelFiles(folder, config, tokenizer, generator, discriminator, images, frozen, about, init)


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, images, files = about["format"], about["images"], about["files"]
        valid = isinstance(images, int) and set(_REQUIRED) <= set(files)
        valid = valid and all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        version, valid = FORMAT, False
    if version != FORMAT:
        raise UserError(f"{path}: format {version}, but this version reads {FORMAT}; update dist_t2i or export again")
    if not valid:
        raise UserError(f"{path} is damaged, or is not from an export; export again with tools/export.py")
    return about


def _check_file(folder: Path, name: str, listed: Mapping[str, Any]) -> None:
    if name not in (*_REQUIRED, FROZEN):
        raise UserError(f"{folder / ABOUT} lists {name!r}, but a model has no such file; export again")
    path, remedy = folder / name, "copy the folder again, or export again with tools/export.py"
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy}")
    size, expected = path.stat().st_size, listed["bytes"]
    if size != expected:
        raise UserError(f"{path}: has {size:,} bytes, should have {expected:,} (truncated or replaced); {remedy}")
    if file_sha256(path) != listed["sha256"]:
        raise UserError(f"{path}: is not the file that was exported (its SHA-256 differs); {remedy}")


def read_frozen(text: TextConfig, tokenizer: Tokenizer, max_tokens: int) -> FrozenEncoder:
    """Reads the encoder that `text.frozen` names, for captions of up to `max_tokens` tokens. Raises UserError."""
    path = Path(text.frozen)
    if path.is_dir():
        return _encoder_of_export(path, tokenizer, max_tokens)
    if path.suffix == ".safetensors":
        return _read_table(path, tokenizer, max_tokens)
    raise UserError(f"text.frozen={path} is neither an export (see tools/export.py) nor a .safetensors table")


def _encoder_of_export(folder: Path, tokenizer: Tokenizer, max_tokens: int) -> FrozenEncoder:
    """The encoder S_D of an exported model. A model that was trained with text.mode=frozen has its frozen encoder
    instead."""
    model = read_export(folder)
    if model.tokenizer != tokenizer:
        remedy = "both models must be trained on sets that share one tokenizer.json"
        raise UserError(
            f"text.frozen={folder}: the tokenizer of this encoder differs from the tokenizer of the set;\n{remedy}"
        )
    text, limit = model.config.text, model.config.data.max_tokens
    if text.encoder == "transformer" and limit < max_tokens:
        raise UserError(f"text.frozen={folder}: this transformer reads {limit} tokens: set data.max_tokens={limit}")
    if model.frozen is not None:
        return model.frozen
    prefix = "text_d." if text.mode == "dual" else "text."
    tensors = {k.removeprefix(prefix): v for k, v in model.discriminator.items() if k.startswith(prefix)}
    about = {"kind": "encoder", "text": dataclasses.asdict(text), "max_tokens": limit}
    return FrozenEncoder(about | {"vocab_size": tokenizer.vocab_size}, tensors, folder / DISCRIMINATOR)


def _read_table(path: Path, tokenizer: Tokenizer, max_tokens: int) -> FrozenEncoder:
    """Reads a table of caption vectors; `tokenizer` encodes the captions."""
    tensors = read_tensors(path)
    try:
        captions = json.loads(read_metadata(path).get("captions", "null"))
    except ValueError:
        captions = None
    vectors = tensors.get("vectors")
    if vectors is None or vectors.ndim != 2 or not isinstance(captions, list) or len(captions) != len(vectors):
        parts = "a tensor `vectors` [N, E], and its metadata needs `captions`, a JSON list of N texts"
        raise UserError(f"text.frozen={path}: the file of a table needs {parts}")
    tokens, lengths = tokenizer.encode([str(caption) for caption in captions], max_tokens)
    return FrozenEncoder({"kind": "table"}, {"vectors": vectors, "tokens": tokens, "lengths": lengths}, path)
