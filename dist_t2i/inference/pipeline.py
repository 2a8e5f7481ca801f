"""Using a trained model: `load(path)`, then `.generate`, `.edit`, `.embed_text`, `.embed_image`, `.score`.

Guarantee: a picture is a function of (weights, prompt, seed, index), bit for bit, whatever else is asked for in the
same call. Each picture's noise has a generator of its own, seeded by (seed, index); every text is encoded by itself; and
the networks always see the same number of rows: one on a CPU (as fast there as many), `CHUNK` on a GPU, padded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from dist_t2i.data.images import FORMATS, PictureError, decode, square, to_rgb, to_uint8, to_unit, upright
from dist_t2i.errors import UserError
from dist_t2i.inference.model_files import ModelFiles, read_model
from dist_t2i.models.networks import build_networks
from dist_t2i.models.text_encoder import TextEmbedding, build_text_encoder
from dist_t2i.utils.seeds import mix
from dist_t2i.utils.tensors import fill

if TYPE_CHECKING:
    from PIL.Image import Image

    from dist_t2i.models.discriminator import Discriminator
    from dist_t2i.models.generator import Generator

CHUNK = 16
"""Rows that a GPU computes at a time."""
_PURPOSE = 3
"""Keeps these draws apart from those of training (`draws.py` uses 1 and 2)."""


class PromptError(UserError, ValueError):
    """An argument that cannot be used, with what to pass instead."""


class PromptWarning(UserWarning):
    """A prompt was used, but not as it stands: it is empty, or was cut."""


class UnknownWordsWarning(PromptWarning):
    """A prompt has words that the model never saw in training; the message names them."""


class Parts(NamedTuple):
    """The networks that using a model needs, in evaluation mode on one device."""

    generator: Generator
    text_g: nn.Module
    """S_G: the encoder whose sentences the generator reads."""
    discriminator: Discriminator
    text_d: nn.Module
    """S_D: the encoder whose sentences pictures are compared with."""
    source: nn.Module | None = None
    """The encoder of pictures that are to be changed, of a model that was trained to edit."""


def load(path: str | Path, device: torch.device | str | None = None) -> TextToImage:
    """The model in a run folder (its newest intact checkpoint) or an exported one, on `device` (default: a GPU if any).

    Raises UserError when the folder holds no model, or files that are damaged or do not belong together.
    """
    return TextToImage(read_model(path), device)


class TextToImage:
    """A trained model. `files` is what it was made from; `images_seen` how many images it was trained on."""

    def __init__(self, files: ModelFiles, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.files, self.config, self.tokenizer = files, files.config, files.tokenizer
        self.images_seen = files.images
        self._parts = build_parts(files, self.device)
        self._chunk = 1 if self.device.type == "cpu" else CHUNK

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.config.data.image_size

    def __repr__(self) -> str:
        size, seen = self.image_size, self.images_seen
        return f"TextToImage({str(self.files.folder)!r}, {size}x{size} px, {seen:,} images seen, {self.device})"

    # ---- text to pictures --------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[str], seed: int = 0, images_per_prompt: int = 1, truncation: float | None = None
    ) -> list[Image]:
        """Pictures for a list of texts: RGB PIL images, all of the first prompt, then all of the second, and so on.

        Picture number i of a prompt depends on (prompt, seed, i) only. Number i of every prompt uses the same noise, so
        that pictures side by side differ by what the texts say. `truncation` scales the noise: below 1 gives more
        typical and less varied pictures, 0 the same one for every seed; None takes the configuration's.

        Warns with UnknownWordsWarning about words that the model never saw (there is a picture all the same), with
        PromptWarning about empty and overlong prompts. Raises PromptError for arguments of the wrong kind.
        """
        from PIL import Image

        prompts = check_texts(prompts, "prompts")
        count = _whole(images_per_prompt, "images_per_prompt", least=1)
        noise_seeds = [mix(_whole(seed, "seed"), index, _PURPOSE) for index in range(count)]
        self._warn(prompts)
        rows = [(prompt, noise_seed) for prompt in prompts for noise_seed in noise_seeds]
        pixels = self.sample([prompt for prompt, _ in rows], [noise_seed for _, noise_seed in rows], truncation)
        return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy()]

    def sample(self, prompts: Sequence[str], noise_seeds: Sequence[int], truncation: float | None = None) -> Tensor:
        """Picture i for prompt i from noise seed i, uint8 [N, 3, H, W] on the CPU. What `generate` is made of.

        Warns of nothing. Raises PromptError.
        """
        prompts = check_texts(prompts, "prompts")
        if len(prompts) != len(noise_seeds):
            raise PromptError(f"{len(prompts)} prompts, but {len(noise_seeds)} noise seeds: give one for each")
        noise, widths = self._noises(noise_seeds, truncation)
        if not prompts:
            return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        generator = self._parts.generator
        text = self._encode(self._parts.text_g, prompts)

        def draw(noise: Tensor, sentence: Tensor, words: Tensor, mask: Tensor) -> Tensor:
            z, condition_noise = noise.split(widths, dim=1)
            return to_uint8(generator(z, sentence, words, mask, condition_noise).images)

        return self._by_chunks(draw, noise, *text)

    # ---- text and picture to picture ---------------------------------------------------------------------------------

    def edit(
        self,
        image: Image | str | Path,
        text: str,
        strength: float = 1.0,
        seed: int = 0,
        truncation: float | None = None,
    ) -> Image:
        """A picture changed to what a text says of it, and otherwise left as it is: RGB, of the model's size.

        `image` is a PIL image or a file of any size and format that training reads: transparency on white, the central
        square, resized. `text` says what the picture shall show, all of it and not only the change, as a caption would.
        `strength` 0 gives the source back exactly and 1 the whole edit; between, every pixel goes that share of its way
        (our reading). `seed` and `truncation` are as in `generate`; for most edits another seed changes little.

        Warns as `generate` does. Raises UserError when the model was not trained to edit, PromptError for arguments that
        cannot be used.
        """
        from PIL import Image

        source = self._pixels(image, "image")
        self._warn(check_texts([text], "text"))
        noise_seeds = [mix(_whole(seed, "seed"), 0, _PURPOSE)]
        pixels = self.sample_edits(source[None], [text], noise_seeds, strength, truncation)
        return Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())

    def sample_edits(
        self,
        sources: Tensor,
        texts: Sequence[str],
        noise_seeds: Sequence[int],
        strength: float = 1.0,
        truncation: float | None = None,
    ) -> Tensor:
        """Source i, uint8 [N, 3, H, W] at the model's size, edited as text i says. What `edit` is made of.

        Returns uint8 [N, 3, H, W] on the CPU; warns of nothing. Raises UserError, PromptError.
        """
        encoder = self._parts.source
        if encoder is None:
            raise UserError(
                f"{self.files.folder}: this model was trained to draw, not to edit (its edit.width is 0); train one that "
                "edits from it: configs/edit-openmoji.yaml shows how"
            )
        texts, strength = check_texts(texts, "texts"), _share(strength, "strength")
        if not len(sources) == len(texts) == len(noise_seeds):
            raise PromptError(
                f"{len(sources)} sources, {len(texts)} texts, {len(noise_seeds)} noise seeds: give as many"
            )
        noise, widths = self._noises(noise_seeds, truncation)
        if not len(sources):
            return sources

        def draw(noise: Tensor, source: Tensor, sentence: Tensor, words: Tensor, mask: Tensor) -> Tensor:
            z, condition_noise = noise.split(widths, dim=1)
            pictures = to_unit(source).contiguous(memory_format=torch.channels_last)
            guide = encoder(pictures, TextEmbedding(sentence, words, mask))
            images = self._parts.generator(z, sentence, words, mask, condition_noise, guide).images
            return to_uint8(pictures + strength * (images - pictures))

        return self._by_chunks(draw, noise, sources, *self._encode(self._parts.text_g, texts))

    # ---- embeddings --------------------------------------------------------------------------------------------------

    def embed_text(self, texts: Sequence[str], which: str = "g") -> Tensor:
        """Sentence embeddings of a list of texts, float32 [N, E] on the CPU: S_G (`which="g"`) or S_D (`"d"`).

        Without two of them (text.mode shared or frozen) both name the one there is; in mode shared, "g" is its moving
        average, as the generator uses it. Raises PromptError.
        """
        if which not in ("g", "d"):
            raise PromptError(f'which must be "g" (what the generator reads) or "d" (the discriminator), got {which!r}')
        texts = check_texts(texts, "texts")
        return self._encode(self._parts.text_g if which == "g" else self._parts.text_d, texts).sentence

    def embed_image(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors of a list of PIL images in the alignment space, float32 [N, A] on the CPU.

        Pictures of any size and mode: transparency on white, the central square, resized. Raises PromptError.
        """
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            raise PromptError(f"images must be a list of PIL images, got {_kind(images)}")
        pixels = [self._pixels(image, f"images[{number}]") for number, image in enumerate(images)]
        if not pixels:
            return torch.empty(0, self.config.model.discriminator.embedding)
        encoder = self.image_encoder()
        return self._by_chunks(lambda pixels: encoder(to_unit(pixels)), torch.stack(pixels))

    def image_encoder(self) -> nn.Module:
        """The network behind `embed_image`, on the device: pictures [B, 3, H, W] in [-1, 1] to unit vectors [B, A]."""
        return ImageEncoder(self._parts.discriminator)

    def embed_aligned(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of a list of texts in the alignment space (by S_D), float32 [N, A] on the CPU. Raises PromptError."""
        sentences = self.embed_text(texts, which="d")
        if not len(sentences):
            return torch.empty(0, self.config.model.discriminator.embedding)
        return self._by_chunks(self._parts.discriminator.align_text, sentences)

    def score(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """How well each picture fits each text, float32 [images, texts]: cosines (-1 to 1) in the alignment space.

        It is the model's own opinion (D's and S_D's), not an independent judge's. Raises PromptError.
        """
        return self.embed_image(images) @ self.embed_aligned(texts).T

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _noises(self, seeds: Sequence[int], truncation: float | None) -> tuple[Tensor, tuple[int, int]]:
        """The noise of rows with these seeds, and the widths of its two parts. Raises PromptError."""
        truncation = self.config.model.generator.truncation if truncation is None else truncation
        _check_truncation(truncation)
        widths = (self._parts.generator.noise_width, self._parts.generator.condition_width)
        rows = [_noise(seed, sum(widths)) for seed in seeds]
        return torch.stack(rows) * truncation if rows else torch.empty(0, sum(widths)), widths

    @torch.no_grad()
    def _encode(self, encoder: nn.Module, texts: Sequence[str]) -> TextEmbedding:
        """The embedding of each text, computed by itself, on the CPU: row i is a function of text i alone."""
        found = {}
        for text in dict.fromkeys(texts):
            tokens, lengths = self.tokenizer.encode([text], self.config.data.max_tokens)
            found[text] = [part.cpu() for part in encoder(tokens.to(self.device), lengths.to(self.device))]
        if not texts:
            return TextEmbedding(
                torch.empty(0, encoder.width), torch.empty(0, 1, encoder.width), torch.empty(0, 1).bool()
            )
        return TextEmbedding(*(torch.cat(part) for part in zip(*(found[text] for text in texts), strict=True)))

    @torch.no_grad()
    def _by_chunks(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """`function` over rows on the device, a fixed number at a time (the last chunk is filled up by repetition)."""
        results = []
        for start in range(0, len(rows[0]), self._chunk):
            index = torch.arange(start, start + self._chunk).clamp(max=len(rows[0]) - 1)
            result = function(*(row[index].to(self.device) for row in rows)).cpu()
            results.append(result[: len(rows[0]) - start])
        return torch.cat(results)

    def _pixels(self, image: Image | str | Path, name: str) -> Tensor:
        """A PIL image or a picture file as training sees it: uint8 [3, H, W] at the model's size. Raises PromptError."""
        from PIL import Image as PIL

        if isinstance(image, (str, Path)) and name == "image":
            return self._file(Path(image))
        if not isinstance(image, PIL.Image):
            raise PromptError(f"{name} must be a PIL image (PIL.Image.open reads a file), got {_kind(image)}")
        try:
            return square(numpy.array(to_rgb(upright(image))), self.image_size)
        except (PictureError, OSError) as error:
            raise PromptError(f"{name} cannot be used: it {error}") from None

    def _file(self, path: Path) -> Tensor:
        try:
            return square(decode(path.read_bytes(), self.image_size), self.image_size)
        except OSError as error:
            raise PromptError(f"cannot read the picture {path}: {error.strerror or error}") from None
        except PictureError as error:
            raise PromptError(f"the picture {path} cannot be used: it {error}; {', '.join(FORMATS)} are read") from None

    def _warn(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            shown = repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")
            unknown = self.tokenizer.unknown_words(prompt)
            if unknown:
                listed = ", ".join(repr(word) for word in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
                message = f"the model never saw {listed} (in {shown}); the picture follows the rest, or chance"
                warnings.warn(message, UnknownWordsWarning, stacklevel=3)
            limit = self.config.data.max_tokens
            if not prompt.strip():
                warnings.warn("an empty prompt: the picture follows chance", PromptWarning, stacklevel=3)
            elif len(self.tokenizer.ids(prompt)) > limit:
                warnings.warn(f"{shown} was cut after {limit} tokens", PromptWarning, stacklevel=3)


class ImageEncoder(nn.Module):
    """The discriminator's trunk and alignment branch: pictures [B, 3, H, W] in [-1, 1] to unit vectors [B, A]."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        return self.discriminator.align_image(self.discriminator.features(images))


def build_parts(files: ModelFiles, device: torch.device) -> Parts:
    """The networks with their weights. Raises UserError when the weights do not fit the configuration."""
    config, vocabulary = files.config, files.tokenizer.vocab_size
    frozen = files.frozen.build() if files.frozen is not None else None
    try:
        with torch.device("meta"):  # nothing is allocated until the shapes are known to agree
            networks = build_networks(
                config.model,
                config.text,
                image_size=config.data.image_size,
                max_tokens=config.data.max_tokens,
                vocab_size=vocabulary,
                edit_width=config.edit.width,
                frozen=frozen,
            )
            encoders = [build_text_encoder(config.text, vocabulary, config.data.max_tokens) for _ in range(2)]
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{files.folder}: its configuration describes no network that can be built: {error}") from None
    where = files.folder
    generator = fill(networks.generator.generator, files.generator, "generator.", where)
    discriminator = fill(networks.discriminator.discriminator, files.discriminator, "discriminator.", where)
    text_g = text_d = frozen
    if frozen is None:
        names = ("text.", "text.") if config.text.mode == "shared" else ("text_g.", "text_d.")
        text_g = fill(encoders[0], files.generator, names[0], where)
        text_d = fill(encoders[1], files.discriminator, names[1], where)
    found = [generator, text_g, discriminator, text_d]
    if networks.generator.source is not None:
        found.append(fill(networks.generator.source, files.generator, "source.", where))
    modules = (module.eval().requires_grad_(False) for module in found)
    return Parts(*(module.to(device) for module in modules))


def check_texts(texts: Sequence[str], name: str) -> list[str]:
    """The texts as a list, with what no encoding can hold (lone surrogates) replaced. Raises PromptError."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        hint = f": write [{texts!r}]" if isinstance(texts, str) and len(texts) < 80 else ""
        raise PromptError(f"{name} must be a list of texts, got {_kind(texts)}{hint}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"{name}[{number}] must be a text, got {_kind(text)}")
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _noise(seed: int, width: int) -> Tensor:
    """Standard normal [width], always drawn on the CPU: the same on every device."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def _whole(value: int, name: str, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numpy.integer)) or (least is not None and value < least):
        raise PromptError(f"{name} must be a whole number{'' if least is None else f' from {least} up'}, got {value!r}")
    return int(value)


def _share(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise PromptError(f"{name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def _check_truncation(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise PromptError(f"truncation must be a number from 0 up (1: all of the noise), got {value!r}")


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "a single text"
    return "nothing" if value is None else f"a {type(value).__name__}"
