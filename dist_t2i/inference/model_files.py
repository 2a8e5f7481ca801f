"""A trained model as files, read back whole and checked: from a run folder or from an exported one.

    EXPORT/
      model.json                  format, images seen, size and SHA-256 of every file that is read
      config.yaml                 the run's configuration, without its paths
      tokenizer.json              the tokenizer and the words that the model saw
      generator.safetensors       EMA weights: `generator.*` and `text_g.*` (text.mode=shared: `text.*`)
      discriminator.safetensors   `discriminator.*` and `text_d.*` (text.mode=shared: `text.*`)
      frozen.safetensors          text.mode=frozen only: the given encoder
      README.md, samples.png, scores.json     for people; never read by the library

Nothing here runs code from a file: tensors are safetensors, the rest is JSON and plain YAML.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_t2i.config import files as config_files
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import UserError
from dist_t2i.models.config import TextConfig
from dist_t2i.models.frozen_text import CaptionTable, FrozenText
from dist_t2i.models.text_encoder import build_text_encoder
from dist_t2i.utils.files import file_sha256
from dist_t2i.utils.tensors import fill, read_metadata, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dist_t2i.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from dist_t2i.config.sections import Config

FORMAT = 2
ABOUT = "model.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
FROZEN = "frozen.safetensors"
STATE = "state.json"
"""What a folder of a checkpoint holds."""


@dataclass(frozen=True)
class ModelFiles:
    """What a trained model consists of, wherever it was read."""

    folder: Path
    """Run or export."""
    config: Config
    tokenizer: Tokenizer
    generator: Mapping[str, Tensor]
    """EMA weights by name: `generator.*`, `text_g.*` or `text.*`."""
    discriminator: Mapping[str, Tensor]
    """Weights by name: `discriminator.*`, `text_d.*` or `text.*`."""
    images: int
    """Images seen in training."""
    frozen: FrozenSource | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """The rest of an export's model.json."""

    def sha256(self) -> str:
        """A hash of all weights and of the tokenizer: names, shapes and values, in sorted order."""
        digest = hashlib.sha256(self.tokenizer.text.encode())
        frozen = self.frozen.tensors if self.frozen else {}
        for part, tensors in (("g", self.generator), ("d", self.discriminator), ("f", frozen)):
            for name in sorted(tensors):
                digest.update(f"{part} {name} {tuple(tensors[name].shape)}".encode())
                digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_model(path: str | Path, *, ema: bool = True) -> ModelFiles:
    """The model in a run folder (its newest intact checkpoint), in one checkpoint of it (RUN/checkpoints/images-...), or in
    an exported folder; with `ema=False` the generator's weights as they are, not their average. Raises UserError.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise UserError(f"{folder} is {what}; give a run folder or an exported model (a folder with {ABOUT})")
    if (folder / ABOUT).is_file():
        if not ema:
            raise UserError(f"{folder}: an exported model holds the averaged weights only; give the run's folder")
        return read_export(folder)
    if (folder / CONFIG).is_file():
        return read_run(folder, ema=ema)
    if (folder / STATE).is_file() and (folder.parents[1] / CONFIG).is_file():
        return read_run(folder.parents[1], ema=ema, at=folder)
    raise UserError(f"{folder} holds neither a run ({CONFIG}, checkpoints) nor an exported model ({ABOUT})")


def read_run(run: Path, *, ema: bool = True, at: Path | None = None) -> ModelFiles:
    """The newest intact checkpoint of a run, or the one in the folder `at`. Raises UserError when there is none yet, or the
    folder is not a run's."""
    from dist_t2i.checkpoint import store

    config = config_files.load(run / CONFIG)
    if at is not None:
        saved: store.Checkpoint | None = store.open_checkpoint(at)
    else:
        saved = store.load_latest(run, warn=lambda message: warnings.warn(message, stacklevel=4))
    if saved is None:
        raise UserError(f"{run}: no checkpoint yet; let the run save one (a stopped run does), then try again")
    tokenizer = Tokenizer.load(run / TOKENIZER)
    discriminator = saved.tensors("discriminator")
    if config.text.mode == "shared":
        discriminator = discriminator | saved.tensors("text")
    frozen = frozen_source(config.text, tokenizer, config.data.max_tokens) if config.text.mode == "frozen" else None
    generator = saved.tensors("ema" if ema else "generator")
    if not ema and config.text.mode == "shared":
        generator = generator | saved.tensors("text")
    return ModelFiles(run, config, tokenizer, generator, discriminator, saved.images, frozen)


def read_export(folder: Path) -> ModelFiles:
    """An exported model, every file checked against model.json. Raises UserError saying which file is wrong and how."""
    about = _about(folder)
    for name, listed in about["files"].items():
        _check_file(folder, name, listed)
    try:
        config = config_files.load(folder / CONFIG)
    except UserError as error:
        made_by = about.get("library", "another version of dist_t2i")
        raise UserError(
            f"{error}\nThis model was exported by {made_by}: use that version, or export it again."
        ) from None
    frozen = None
    if config.text.mode == "frozen":
        frozen = FrozenSource(about.get("frozen") or {}, read_tensors(folder / FROZEN), folder / FROZEN)
    return ModelFiles(
        folder=folder,
        config=config,
        tokenizer=Tokenizer.load(folder / TOKENIZER),
        generator=read_tensors(folder / GENERATOR),
        discriminator=read_tensors(folder / DISCRIMINATOR),
        images=about["images"],
        frozen=frozen,
        about=about,
    )


def _about(folder: Path) -> dict[str, Any]:
    """model.json, with the entries that are needed checked for their types."""
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, images, files = about["format"], about["images"], about["files"]
        valid = isinstance(images, int) and {CONFIG, TOKENIZER, GENERATOR, DISCRIMINATOR} <= set(files)
        valid = valid and all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        version, valid = FORMAT, False
    if version != FORMAT:
        raise UserError(
            f"{path}: format {version}, but this version reads format {FORMAT}; update dist_t2i or export again"
        )
    if not valid:
        raise UserError(f"{path}: damaged or not an exported model; export again with tools/export.py")
    return about


def _check_file(folder: Path, name: str, listed: Mapping[str, Any]) -> None:
    if name not in (CONFIG, TOKENIZER, GENERATOR, DISCRIMINATOR, FROZEN):
        raise UserError(f"{folder / ABOUT}: lists {name!r}, which is no file of a model; export again")
    path, remedy = folder / name, "copy the folder again, or export again with tools/export.py"
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy}")
    size = path.stat().st_size
    if size != listed["bytes"]:
        raise UserError(
            f"{path}: has {size:,} bytes, should have {listed['bytes']:,} (cut short, or mixed up); {remedy}"
        )
    if file_sha256(path) != listed["sha256"]:
        raise UserError(f"{path}: is not the file that was exported (its SHA-256 differs); {remedy}")


@dataclass(frozen=True)
class FrozenSource:
    """A given encoder as data: what an export stores, and what `build` makes a module from."""

    about: dict[str, Any]
    """JSON-able: `{"kind": "table"}`, or `{"kind": "encoder", "text": {...}, "vocab_size": n, "max_tokens": n}`."""
    tensors: dict[str, Tensor]
    """A table's `vectors`, `tokens`, `lengths`, or an encoder's parameters."""
    where: Path
    """The file they came from, for messages."""

    def build(self) -> nn.Module:
        """A module with `.width` and forward(tokens, lengths) -> `TextEmbedding`, on the CPU. Raises UserError."""
        try:
            if self.about["kind"] == "table":
                return CaptionTable(*(self.tensors[name] for name in ("vectors", "tokens", "lengths")))
            text = TextConfig(**self.about["text"])
            with torch.device("meta"):
                encoder = build_text_encoder(text, self.about["vocab_size"], self.about["max_tokens"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.where}: not a frozen text encoder ({error}); export the model again") from None
        return FrozenText(fill(encoder, self.tensors, "", self.where)).eval()


def load_frozen(text: TextConfig, tokenizer: Tokenizer, max_tokens: int) -> nn.Module:
    """The given encoder that the configuration names; see `FrozenSource.build` and `frozen_source`."""
    return frozen_source(text, tokenizer, max_tokens).build()


def frozen_source(text: TextConfig, tokenizer: Tokenizer, max_tokens: int) -> FrozenSource:
    """What `text.frozen` names, for captions of up to `max_tokens` tokens of `tokenizer`.

    Raises UserError when that is neither an exported folder nor a table, or one made with another tokenizer.
    """
    path = Path(text.frozen)
    if path.is_dir():
        return _from_export(path, tokenizer, max_tokens)
    if path.suffix == ".safetensors":
        return _from_table(path, tokenizer, max_tokens)
    raise UserError(
        f"text.frozen={path}: neither an exported folder (tools/export.py makes one) nor a .safetensors table"
    )


def _from_export(folder: Path, tokenizer: Tokenizer, max_tokens: int) -> FrozenSource:
    from dist_t2i.inference.model_files import read_export

    source = read_export(folder)
    if source.tokenizer != tokenizer:
        raise UserError(
            f"text.frozen={folder}: its encoder was trained with another tokenizer than this set's;\n"
            "both models must be trained on sets that share one tokenizer.json"
        )
    limit = source.config.data.max_tokens
    if source.config.text.encoder == "transformer" and limit < max_tokens:
        raise UserError(f"text.frozen={folder}: its transformer reads {limit} tokens: set data.max_tokens to that")
    if source.frozen is not None:
        return source.frozen
    prefix = "text_d." if source.config.text.mode == "dual" else "text."
    found = {k.removeprefix(prefix): v for k, v in source.discriminator.items() if k.startswith(prefix)}
    about = {"kind": "encoder", "text": dataclasses.asdict(source.config.text), "max_tokens": limit}
    return FrozenSource(about | {"vocab_size": tokenizer.vocab_size}, found, folder / "discriminator.safetensors")


def _from_table(path: Path, tokenizer: Tokenizer, max_tokens: int) -> FrozenSource:
    tensors = read_tensors(path)
    try:
        captions = json.loads(read_metadata(path).get("captions", "null"))
    except ValueError:
        captions = None
    vectors = tensors.get("vectors")
    if vectors is None or vectors.ndim != 2 or not isinstance(captions, list) or len(captions) != len(vectors):
        raise UserError(
            f"text.frozen={path}: a table needs a tensor `vectors` [N, E] and, in the file's metadata, `captions`: "
            "a JSON list of N texts"
        )
    tokens, lengths = tokenizer.encode([str(caption) for caption in captions], max_tokens)
    return FrozenSource({"kind": "table"}, {"vectors": vectors, "tokens": tokens, "lengths": lengths}, path)
