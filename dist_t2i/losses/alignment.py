"""The alignment terms: which of D's embeddings of pictures and captions are contrasted. All such terms are listed here.

`Discriminator.embed_pictures` and `embed_captions` give the embeddings and their names; the rows are those of the
global batch, in order. D's terms align real pictures with their captions; G's terms align fakes with the embeddings
that D's step computed for the captions and the real pictures. The key of section `loss` that has the name of a term is
its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dist_t2i.config.sections import LossConfig
from dist_t2i.losses import functional as losses

Embeddings = Mapping[str, Tensor]
"""Tensors with one row per picture or caption, by name."""


class Negatives(NamedTuple):
    """Which pairs of rows are not contrasted with each other, and which other positions are further negatives."""

    same: Tensor  # bool [B, B]: pairs that share the picture or the caption, and so are never negatives
    positions: Tensor | None = None  # int64 [K, P]: other positions of region maps that are negatives, too


def discriminator_terms(e: Embeddings, loss: LossConfig, negatives: Negatives) -> dict[str, Tensor]:
    """D's losses, scalars by name, from the embeddings of real pictures and their captions."""
    same = negatives.same
    # Pictures [B, A] with sentences [B, A]: InfoNCE (van den Oord et al. 2018, Eq. 4) in both directions.
    terms = {"d_alignment": losses.info_nce(e["image"], e["text"], loss.temperature, same)}
    # Positions of region maps [B, P, A'] with sentences [B, A']: our reading.
    if "regions" in e and loss.d_alignment_regions:
        regions, text = e["regions"], e["region_text"]
        terms["d_alignment_regions"] = losses.region_info_nce(regions, text, loss.region_temperature, same)
    # Positions [B, P, A'] with words [B, T, A']: DAMSM (AttnGAN, Eq. 7-13).
    if "words" in e and loss.d_alignment_words:
        terms["d_alignment_words"] = _words(e, e, loss, same)
    return terms


def generator_terms(fake: Embeddings, real: Embeddings, loss: LossConfig, negatives: Negatives) -> dict[str, Tensor]:
    """G's losses, scalars by name; `real` has the embeddings of real pictures and of their captions, as constants."""
    same, positions = negatives
    # Fakes [B, A] with their sentences [B, A] and with the real pictures of the same captions [B, A].
    terms = {
        "g_alignment_text": losses.info_nce(fake["image"], real["text"], loss.temperature, same),
        "g_alignment_image": losses.info_nce(fake["image"], real["image"], loss.temperature, same),
    }
    # Positions of fakes [B, P, A'] with the same positions of real pictures [B, P, A'] (PatchNCE, Park et al. 2020).
    if "regions" in fake and loss.g_alignment_regions:
        regions = fake["regions"], real["regions"]
        terms["g_alignment_regions"] = losses.region_info_nce(*regions, loss.region_temperature, same, positions)
    # Positions of fakes [B, P, A'] with words [B, T, A']: DAMSM (AttnGAN, Eq. 7-13).
    if "words" in real and loss.g_alignment_words:
        terms["g_alignment_words"] = _words(fake, real, loss, same)
    return terms


@torch.no_grad()
def wrong_captions(cosines: Tensor | None, matching: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """For each picture, the row of its wrong caption, int64 [m], and whether even this caption matches it, bool [m].

    Of the captions in its group of `group` consecutive rows that do not match the picture, it is the one most similar to
    the picture in D's alignment space: a hard negative (Faghri et al. 2018, VSE++, Eq. 6). `cosines` [m, m] are those of
    pictures and captions (None for groups of two, which have one candidate), and `matching` bool [m, m] the pairs that
    share the picture or the caption. Groups of fixed rows give the same captions for any number of ranks.
    """
    row = torch.arange(len(matching), device=matching.device)
    if cosines is None:
        wrong = row ^ 1
    else:
        near = (row[:, None] // group == row // group) & (row[:, None] != row)
        wrong = cosines.masked_fill(matching, -2.0).masked_fill(~near, -3.0).argmax(dim=1)
    return wrong, matching[row, wrong]


def _words(pictures: Embeddings, captions: Embeddings, loss: LossConfig, same: Tensor) -> Tensor:
    embeddings = pictures["word_regions"], captions["words"], captions["word_mask"]
    return losses.word_info_nce(*embeddings, loss.word_temperature, same, loss.word_sharpness)
