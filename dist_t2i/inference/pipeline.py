"""Uses a trained model: `load(path)`, then `.generate`, `.edit`, `.embed_text`, `.embed_image`, `.score`.

Guarantee: every bit of an image depends only on (weights, prompt, seed, index), not on the rest of the call. Therefore
each image has its own noise generator, seeded by (seed, index), and each text is encoded separately. The networks
always compute the same number of rows: one on a CPU, where larger batches save no time, and `CHUNK` on a GPU, where the
last chunk is padded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from dist_t2i.data.images import FORMATS, PictureError, decode, square, to_rgb, to_uint8, to_unit, upright
from dist_t2i.errors import UserError
from dist_t2i.inference.model_files import ModelFiles, read_model
from dist_t2i.models.networks import build_networks
from dist_t2i.models.text_encoder import TextEmbedding, build_text_encoder
from dist_t2i.utils.seeds import Purpose, mix
from dist_t2i.utils.tensors import fill

if TYPE_CHECKING:
    from dist_t2i.models.discriminator import Discriminator
    from dist_t2i.models.generator import Generator
    from dist_t2i.models.source_encoder import SourceEncoder

CHUNK = 16
"""Number of rows in a batch on a GPU."""


class PromptError(UserError, ValueError):
    """An argument cannot be used; the message says what to pass instead."""


class PromptWarning(UserWarning):
    """A prompt was empty or was truncated."""


class UnknownWordsWarning(PromptWarning):
    """A prompt has words that were in no training caption; the message names them."""


class ModelParts(NamedTuple):
    """The networks of a trained model, in evaluation mode on one device.

    The generator reads the sentence embeddings of `text_g` (S_G). Images are compared with the sentence embeddings of
    `text_d` (S_D). `source` encodes source images; it is None unless the model was trained to edit.
    """

    generator: Generator
    text_g: nn.Module
    discriminator: Discriminator
    text_d: nn.Module
    source: SourceEncoder | None


def load(path: str | Path, device: torch.device | str | None = None) -> TextToImage:
    """Loads a run folder (its newest intact checkpoint) or an export on `device` (default: a GPU if available).

    Raises UserError when the folder holds no model, or when files are damaged or do not belong together.
    """
    return TextToImage(read_model(path), device)


class TextToImage:
    """A trained model. The model was built from `files`; `images_seen` is the number of images that it was trained
    on."""

    def __init__(self, files: ModelFiles, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.files, self.config, self.tokenizer = files, files.config, files.tokenizer
        self.images_seen = files.images
        self._parts = build_parts(files, self.device)
        self.image_encoder = ImageEncoder(self._parts.discriminator)  # used by `embed_image`
        self._chunk = 1 if self.device.type == "cpu" else CHUNK

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.config.data.image_size

    def __repr__(self) -> str:
        size, seen = self.image_size, self.images_seen
        return f"TextToImage({str(self.files.folder)!r}, {size}x{size} px, {seen:,} images seen, {self.device})"

    def generate(
        self, prompts: Sequence[str], seed: int = 0, images_per_prompt: int = 1, truncation: float | None = None
    ) -> list[Image.Image]:
        """Generates RGB images for a list of texts: all images of the first prompt, then all of the second, and so on.

        Image i of a prompt depends only on (prompt, seed, i), and its noise is the same for every prompt. `truncation`
        scales the noise. Below 1, images are more typical and less varied; at 0, every seed gives the same image; None
        means the configured value. Warns about words that were in no training caption (UnknownWordsWarning), and about
        empty and overlong prompts (PromptWarning). Raises PromptError for arguments of the wrong kind.
        """
        prompts = check_texts(prompts, "prompts")
        count, seed = _integer(images_per_prompt, "images_per_prompt", least=1), _integer(seed, "seed")
        noise_seeds = [mix(seed, index, Purpose.NEGATIVES_AND_INFERENCE_NOISE) for index in range(count)]
        self._warn(prompts)
        repeated = [prompt for prompt in prompts for _ in range(count)]
        pixels = self.sample(repeated, noise_seeds * len(prompts), truncation)
        return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]

    def sample(self, prompts: Sequence[str], noise_seeds: Sequence[int], truncation: float | None = None) -> Tensor:
        """`generate` without warnings: image i from prompt i and noise seed i, uint8 [N, 3, H, W]. Raises
        PromptError."""
        prompts = check_texts(prompts, "prompts")
        if len(prompts) != len(noise_seeds):
            raise PromptError(f"{len(prompts)} prompts, but {len(noise_seeds)} noise seeds: give one seed per prompt")
        noise, widths = self._noise(noise_seeds, truncation)
        empty = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)

        def images(noise: Tensor, sentence: Tensor, words: Tensor, mask: Tensor) -> Tensor:
            z, condition_noise = noise.split(widths, dim=1)
            return to_uint8(self._parts.generator(z, sentence, words, mask, condition_noise).images)

        return self._by_chunks(images, empty, noise, *self._encode(self._parts.text_g, prompts))

    def edit(
        self,
        image: Image.Image | str | Path,
        text: str,
        strength: float = 1.0,
        seed: int = 0,
        truncation: float | None = None,
    ) -> Image.Image:
        """Changes an image to match a text, and keeps the rest unchanged. Returns an RGB image of the model's size.

        `image` is a PIL image, or a file in a format that training reads. Transparent pixels become white, and the
        central square is resized. `text` describes the full edited image, not only the change. `strength` 0 returns
        exactly the source, and 1 returns the full edit; values between 0 and 1 interpolate each pixel linearly (our
        reading of the paper). `seed`, `truncation` and the warnings are as in `generate`. Raises UserError when the
        model was not trained to edit, and PromptError for unusable arguments.
        """
        source = self._pixels(image, "image")
        self._warn(check_texts([text], "text"))
        noise_seeds = [mix(_integer(seed, "seed"), 0, Purpose.NEGATIVES_AND_INFERENCE_NOISE)]
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
        """`edit` without warnings for sources uint8 [N, 3, H, W] at the model's size. Raises UserError, PromptError."""
        encoder, generator = self._parts.source, self._parts.generator
        if encoder is None:
            raise UserError(
                f"{self.files.folder}: this model cannot edit, because it was trained with edit.width=0. Train an "
                "editing model that starts from this one: configs/edit-openmoji.yaml shows how"
            )
        texts, strength = check_texts(texts, "texts"), _number(strength, "strength", "a number from 0 to 1", most=1.0)
        counts = len(sources), len(texts), len(noise_seeds)
        if len(set(counts)) > 1:
            raise PromptError("{} sources, {} texts, {} noise seeds: give equal numbers".format(*counts))
        noise, widths = self._noise(noise_seeds, truncation)

        def images(noise: Tensor, source: Tensor, sentence: Tensor, words: Tensor, mask: Tensor) -> Tensor:
            z, condition_noise = noise.split(widths, dim=1)
            pixels = to_unit(source).contiguous(memory_format=torch.channels_last)
            guide = encoder(pixels, TextEmbedding(sentence, words, mask))
            edited = generator(z, sentence, words, mask, condition_noise, guide).images
            return to_uint8(pixels + strength * (edited - pixels))

        return self._by_chunks(images, sources, noise, sources, *self._encode(self._parts.text_g, texts))

    def embed_text(self, texts: Sequence[str], which: str = "g") -> Tensor:
        """Sentence embeddings of a list of texts, float32 [N, E] on the CPU: S_G (`which="g"`) or S_D (`"d"`).

        With text.mode=frozen, both are the frozen encoder. With text.mode=shared, "g" is the moving average of the
        shared encoder, which the generator uses, and "d" is the shared encoder with its last weights. Raises
        PromptError.
        """
        if which not in ("g", "d"):
            raise PromptError(f'which must be "g" (generator, S_G) or "d" (discriminator, S_D), got {which!r}')
        texts = check_texts(texts, "texts")
        return self._encode(self._parts.text_g if which == "g" else self._parts.text_d, texts).sentence

    def embed_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of PIL images (any size and mode) in the alignment space, float32 [N, A]. Raises PromptError."""
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            raise PromptError(f"images must be a list of PIL images, got {_kind(images)}")
        rows = [self._pixels(image, f"images[{number}]") for number, image in enumerate(images)]
        empty = torch.empty(0, self.config.model.discriminator.embedding)
        pixels = torch.stack(rows) if rows else empty
        return self._by_chunks(lambda chunk: self.image_encoder(to_unit(chunk)), empty, pixels)

    def embed_aligned(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts in the alignment space (by S_D), float32 [N, A] on the CPU. Raises PromptError."""
        empty = torch.empty(0, self.config.model.discriminator.embedding)
        return self._by_chunks(self._parts.discriminator.align_text, empty, self.embed_text(texts, which="d"))

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Cosines (-1 to 1) of each image and each text in the alignment space, float32 [images, texts].

        The cosines come from the model's own D and S_D, so they are not an independent evaluation. Raises PromptError.
        """
        return self.embed_image(images) @ self.embed_aligned(texts).T

    def _noise(self, seeds: Sequence[int], truncation: float | None) -> tuple[Tensor, tuple[int, int]]:
        """One row of noise per seed, always from the CPU's random generator, and the widths of a row's two parts."""
        truncation = self.config.model.generator.truncation if truncation is None else truncation
        truncation = _number(truncation, "truncation", "a number that is at least 0 (1: unchanged noise)")
        widths = (self._parts.generator.noise_width, self._parts.generator.condition_width)
        rows = [torch.randn(sum(widths), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows) * truncation if rows else torch.empty(0, sum(widths)), widths

    @torch.no_grad()
    def _encode(self, encoder: nn.Module, texts: Sequence[str]) -> TextEmbedding:
        embeddings = {}
        for text in dict.fromkeys(texts or [""]):  # without texts, "" is encoded to get the right shapes
            tokens, lengths = self.tokenizer.encode([text], self.config.data.max_tokens)
            embeddings[text] = [part.cpu() for part in encoder(tokens.to(self.device), lengths.to(self.device))]
        rows = [embeddings[text] for text in texts or [""]]
        return TextEmbedding(*(torch.cat(parts)[: len(texts)] for parts in zip(*rows, strict=True)))

    @torch.no_grad()
    def _by_chunks(self, function: Callable[..., Tensor], empty: Tensor, *rows: Tensor) -> Tensor:
        """Applies `function` on the device to a fixed number of rows at a time; returns `empty` if there are no rows.

        Copies of the last row fill the last chunk.
        """
        results = []
        for start in range(0, len(rows[0]), self._chunk):
            index = torch.arange(start, start + self._chunk).clamp(max=len(rows[0]) - 1)
            result = function(*(row[index].to(self.device) for row in rows)).cpu()
            results.append(result[: len(rows[0]) - start])
        return torch.cat(results) if results else empty

    def _pixels(self, image: Image.Image | str | Path, name: str) -> Tensor:
        """A PIL image or an image file as training sees it: uint8 [3, H, W] at the model's size. Raises PromptError."""
        file = isinstance(image, (str, Path)) and name == "image"
        if not file and not isinstance(image, Image.Image):
            raise PromptError(f"{name} must be a PIL image (PIL.Image.open reads a file), got {_kind(image)}")
        try:
            if isinstance(image, Image.Image):
                return square(numpy.array(to_rgb(upright(image))), self.image_size)
            return square(decode(Path(image).read_bytes(), self.image_size), self.image_size)
        except (PictureError, OSError) as error:
            if not file:
                raise PromptError(f"{name} cannot be used: it {error}") from None
            if isinstance(error, OSError):
                raise PromptError(f"cannot read the picture {image}: {error.strerror or error}") from None
            formats = ", ".join(FORMATS)
            raise PromptError(f"the picture {image} cannot be used: it {error}; {formats} are read") from None

    def _warn(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            quoted = repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")
            if unknown := self.tokenizer.unknown_words(prompt):
                listed = ", ".join(repr(word) for word in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
                text = f"no training caption contains {listed} (in {quoted}), so the image depends on the other words"
                warnings.warn(text, UnknownWordsWarning, stacklevel=3)
            limit = self.config.data.max_tokens
            if not prompt.strip():
                warnings.warn("a prompt is empty: its image is random", PromptWarning, stacklevel=3)
            elif len(self.tokenizer.ids(prompt)) > limit:
                warnings.warn(f"{quoted} was cut after {limit} tokens", PromptWarning, stacklevel=3)


class ImageEncoder(nn.Module):
    """The discriminator's trunk and alignment branch: images [B, 3, H, W] in [-1, 1] to unit vectors [B, A]."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        return self.discriminator.align_image(self.discriminator.features(images))


def fresh_text_encoder(files: ModelFiles, seed: int) -> nn.Module:
    """A text encoder of the model's architecture with fresh weights, in evaluation mode on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_text_encoder(files.config.text, files.tokenizer.vocab_size, files.config.data.max_tokens).eval()


def build_parts(files: ModelFiles, device: torch.device) -> ModelParts:
    """Builds the networks with their weights. Raises UserError when the weights do not fit the configuration."""
    config, folder, vocabulary = files.config, files.folder, files.tokenizer.vocab_size
    text, limit = config.text, config.data.max_tokens
    frozen = files.frozen.build() if files.frozen is not None else None
    sizes = {"image_size": config.data.image_size, "max_tokens": limit, "vocab_size": vocabulary}
    try:
        with torch.device("meta"):  # allocates no memory; `fill` then checks the shapes
            networks = build_networks(config.model, text, **sizes, edit_width=config.edit.width, frozen=frozen)
            encoders = [build_text_encoder(text, vocabulary, limit) for _ in range(2)]
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: the networks in its configuration cannot be built: {error}") from None
    generator = fill(networks.generator.generator, files.generator, "generator.", folder)
    discriminator = fill(networks.discriminator.discriminator, files.discriminator, "discriminator.", folder)
    if frozen is not None:
        text_g = text_d = frozen
    else:
        prefixes = ("text.", "text.") if text.mode == "shared" else ("text_g.", "text_d.")
        text_g = fill(encoders[0], files.generator, prefixes[0], folder)
        text_d = fill(encoders[1], files.discriminator, prefixes[1], folder)
    source = networks.generator.source
    source = None if source is None else fill(source, files.generator, "source.", folder)
    parts = ModelParts(generator, text_g, discriminator, text_d, source)
    for module in parts:
        if module is not None:
            module.eval().requires_grad_(False).to(device)
    return parts


def check_texts(texts: Sequence[str], name: str) -> list[str]:
    """The texts as a list. Lone surrogates, which UTF-8 cannot encode, are replaced. Raises PromptError."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        hint = f": write [{texts!r}]" if isinstance(texts, str) and len(texts) < 80 else ""
        raise PromptError(f"{name} must be a list of texts, got {_kind(texts)}{hint}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"{name}[{number}] must be a text, got {_kind(text)}")
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _integer(value: int, name: str, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numpy.integer)) or (least is not None and value < least):
        raise PromptError(f"{name} must be an integer{'' if least is None else f' >= {least}'}, got {value!r}")
    return int(value)


def _number(value: float, name: str, expected: str, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or value == math.inf:
        raise PromptError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "a single text"
    return "nothing" if value is None else f"a {type(value).__name__}"
