"""The micro-batches of the stream: images with one caption each."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy
import torch

from dist_t2i.data.stream.buffers import BufferRef, buffer_ref

SMALL_BYTES = 2**21
"""The bytes of the largest tensor that a worker sends through its pipe; larger tensors pass through shared memory."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of m images with one caption each; row i is the sample of stream position `positions[i]`."""

    images: torch.Tensor
    """uint8 [m, 3, H, W], RGB."""
    tokens: torch.Tensor
    """int64 [m, T], padded with 0."""
    lengths: torch.Tensor
    """int64 [m], tokens per caption, at least 1."""
    image_ids: torch.Tensor
    """int64 [m], index of the image in its split, the same at every visit of the image."""
    caption_ids: torch.Tensor
    """int64 [m], the `caption_id` of each caption: equal captions have equal ids."""
    positions: torch.Tensor
    """int64 [m], position in the global stream."""
    captions: list[str]
    keys: list[str]
    sources: torch.Tensor | None = None
    """uint8 [m, 3, H, W], the source of each image for editing; None unless `edit` is configured."""
    source_ids: torch.Tensor | None = None
    """int64 [m], index of the source image in its split; -1 for a row without a source, which is black in `sources`."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`; copies from pinned memory overlap with computation."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch with its tensors in page-locked memory."""
        return self._mapped(torch.Tensor.pin_memory)

    def __getstate__(self) -> dict[str, Any]:
        """How a worker sends a batch. Tensors in a shared buffer are sent as references. Small tensors are sent as
        bytes through the pipe, which is faster than shared memory. torch sends the remaining tensors."""
        tensors = self._tensors()
        small = {name: t.numpy() for name, t in tensors.items() if t.nbytes <= SMALL_BYTES and not t.is_cuda}
        refs = {name: ref for name, t in tensors.items() if name not in small and (ref := buffer_ref(t))}
        return vars(self) | small | refs

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            value = value.tensor() if isinstance(value, BufferRef) else value
            vars(self)[name] = torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changes: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changes)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


@lru_cache(maxsize=100_000)
def caption_id(caption: str) -> int:
    """A 63-bit hash of a caption that ignores case, spacing and Unicode form."""
    text = " ".join(unicodedata.normalize("NFC", caption).lower().split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1
