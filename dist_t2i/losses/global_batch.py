"""The global batch for contrastive losses: the embeddings of all rows. Only a rank's own rows carry a graph.

Each rank computes the same loss over all B rows; only the rows of its current micro-batch carry a graph. The sum of the
gradients over ranks and micro-batches equals the gradient of the loss over the global batch. DeepSpeed averages
gradients instead of summing them, so the loss is multiplied by `share`. No gradient crosses ranks, as with open_clip's
`gather_with_grad=False, local_loss=False`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_t2i.losses.functional import same_pairs


def gather_rows(rows: Tensor) -> Tensor:
    """[m, ...] on each of W ranks -> [W m, ...] in rank order on every rank, without a graph. Collective."""
    rows, world_size = rows.detach().contiguous(), dist.get_world_size()
    if world_size == 1:
        return rows
    gathered = rows.new_empty(world_size * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows)
    return gathered


def global_same_pairs(ids: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """bool [B, B]: pairs of the global batch that share the picture or the caption. Collective.

    `ids`: the picture ids and caption ids (int64 [m]) of each micro-batch of this rank.
    """
    rows = torch.cat([gather_rows(torch.stack(pair, dim=1)) for pair in ids])
    return same_pairs(rows[:, 0], rows[:, 1])


class GlobalRows:
    """Embeddings of the B rows of a step. Row i (of m) of micro-batch k on rank r (of W) becomes row (k W + r) m + i of
    the global batch."""

    def __init__(self, micro_batches: int):
        self.micro_batches, self.share = micro_batches, micro_batches * dist.get_world_size()
        self._parts: list[dict[str, Tensor]] = [{} for _ in range(micro_batches)]

    def put(self, index: int, own: Mapping[str, Tensor]) -> None:
        """Gathers all ranks' rows of micro-batch `index`, as constants. Collective."""
        self._parts[index] = {name: gather_rows(value) for name, value in own.items()}

    @property
    def constants(self) -> dict[str, Tensor]:
        """[B, ...] by name, without a graph. Every micro-batch must have been `put`."""
        if len(self._parts) == 1:
            return self._parts[0]
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}

    def with_own(self, index: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The constants, with this rank's rows of micro-batch `index` replaced by `own` and its graph."""
        return {name: self._replace(value, index, own[name]) for name, value in self.constants.items()}

    def _replace(self, rows: Tensor, index: int, own: Tensor) -> Tensor:
        if len(rows) == len(own):
            return own
        first = (index * dist.get_world_size() + dist.get_rank()) * len(own)
        return torch.cat([rows[:first], own, rows[first + len(own) :]])
