"""What the stream yields: one micro-batch of pictures with their captions."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy
import torch

from dist_t2i.data.stream.buffers import Loan, loan_of

SMALL_BYTES = 2**21
"""Up to so many bytes a tensor comes from a worker through its pipe."""


@dataclass
class Batch:
    """m pictures, one caption each; row i is that of stream position `positions[i]`."""

    images: torch.Tensor
    """uint8 [m, 3, H, W], RGB."""
    tokens: torch.Tensor
    """int64 [m, T], padded with 0."""
    lengths: torch.Tensor
    """int64 [m], tokens per caption, at least 1."""
    image_ids: torch.Tensor
    """int64 [m], index of the picture in its split: equal for two visits of one picture."""
    caption_ids: torch.Tensor
    """int64 [m], see `caption_id`: equal for equal captions."""
    positions: torch.Tensor
    """int64 [m], position in the global stream."""
    captions: list[str]
    keys: list[str]
    sources: torch.Tensor | None = None
    """uint8 [m, 3, H, W], the pictures that these ones are edits of; only where `edit` is configured."""
    source_ids: torch.Tensor | None = None
    """int64 [m], as `image_ids`; -1 where there is none (its row of `sources` is black)."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`; copies overlap with computing when they were pinned."""
        return self._with({name: t.to(device, non_blocking=True) for name, t in self._tensors().items()})

    def pin_memory(self) -> Batch:
        """For the DataLoader: the batch with its tensors in page-locked memory."""
        return self._with({name: t.pin_memory() for name, t in self._tensors().items()})

    def __getstate__(self) -> dict[str, Any]:
        """From a worker, small tensors come quicker as bytes through the pipe than as shared memory of their own, and
        those that lie in a buffer come as its number."""
        small = {name: t.numpy() for name, t in self._tensors().items() if t.nbytes <= SMALL_BYTES and not t.is_cuda}
        large = {name: t for name, t in self._tensors().items() if name not in small}
        return vars(self) | small | {name: loan for name, t in large.items() if (loan := loan_of(t))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _received(value) for name, value in state.items()})

    def _with(self, tensors: dict[str, Any]) -> Batch:
        return replace(self, **tensors)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def _received(value: Any) -> Any:
    if isinstance(value, Loan):
        return value.tensor()
    return torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value


@lru_cache(maxsize=100_000)
def caption_id(caption: str) -> int:
    """63 bits that name a caption, whatever its case, spacing and Unicode form."""
    text = " ".join(unicodedata.normalize("NFC", caption).lower().split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1
