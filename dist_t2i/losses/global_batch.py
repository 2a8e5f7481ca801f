"""The global batch as the contrastive losses see it: every row's embedding, a graph only behind one's own.

Each rank computes the same loss over all B rows, in which the rows of its current micro-batch carry a graph and all
others are constants. Added over ranks and micro-batches, the gradients are exactly those of the loss over the whole
batch; since DeepSpeed averages instead of adding, the loss is multiplied by `share` (ranks times micro-batches).
Nothing differentiable crosses a rank. (open_clip's `gather_with_grad=False, local_loss=False` rests on the same idea.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_t2i.data.stream.batch import Batch
from dist_t2i.losses.functional import same_pairs
from dist_t2i.models.discriminator import Embeddings


def gather_rows(rows: Tensor) -> Tensor:
    """[m, ...] on each of W ranks -> [W m, ...] in rank order on all of them, without a graph. Collective."""
    world_size = dist.get_world_size()
    rows = rows.detach().contiguous()
    if world_size == 1:
        return rows
    everyone = rows.new_empty(world_size * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows)
    return everyone


class RowIds:
    """Which pairs of the global batch show the same picture or say the same: `same`, bool [B, B]. Collective."""

    def __init__(self, batches: Sequence[Batch]):
        gathered = [gather_rows(torch.stack([b.image_ids, b.caption_ids], dim=1)) for b in batches]
        image_ids, caption_ids = torch.cat(gathered).unbind(1)
        self.same = same_pairs(image_ids, caption_ids)


class GlobalRows:
    """Embeddings of the B rows of a step, micro-batch by micro-batch: row (a W + r) m + i is rank r's row i of a."""

    def __init__(self, micro_batches: int):
        self.micro_batches = micro_batches
        self.share = micro_batches * dist.get_world_size()
        self._parts: list[Embeddings] = [{} for _ in range(micro_batches)]

    def put(self, index: int, own: Embeddings) -> None:
        """Every rank's rows of micro-batch `index`, as constants. Collective."""
        self._parts[index] = {name: gather_rows(value) for name, value in own.items()}

    @property
    def constants(self) -> Embeddings:
        """[B, ...] by name, without a graph; all micro-batches must have been put."""
        if len(self._parts) == 1:
            return self._parts[0]
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}

    def with_own(self, index: int, own: Embeddings) -> Embeddings:
        """The constants, with this rank's rows of micro-batch `index` replaced by `own` and its graph."""
        return {name: self._replace(value, index, own[name]) for name, value in self.constants.items()}

    def _replace(self, everyone: Tensor, index: int, own: Tensor) -> Tensor:
        if len(everyone) == len(own):
            return own
        first = (index * dist.get_world_size() + dist.get_rank()) * len(own)
        return torch.cat([everyone[:first], own, everyone[first + len(own) :]])
