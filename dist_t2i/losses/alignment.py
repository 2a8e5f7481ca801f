"""The alignments: what is contrasted of D's embeddings of pictures and captions. The one list of them.

Embeddings are named tensors with one row a picture or caption, made by `Discriminator.embed_pictures` and
`embed_captions`; whoever trains gathers and compares them without knowing the names. D's terms align real pictures with
their captions; G's align fakes with what D's step made of the captions and of the real pictures. The name of a term is
its weight's in section `loss`. Row i of everything belongs to picture i of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dist_t2i.config.sections import LossConfig
from dist_t2i.losses import functional as losses
from dist_t2i.models.discriminator import Embeddings


class Negatives(NamedTuple):
    """What the rows of the global batch are contrasted with, and what not."""

    same: Tensor
    """bool [B, B]: pairs that show the same picture or say the same, never each other's negatives"""
    places: Tensor | None = None
    """int64 [K, P]: other places of region maps that are negatives too (`losses.region_info_nce`)"""


def discriminator_terms(e: Embeddings, loss: LossConfig, negatives: Negatives) -> dict[str, Tensor]:
    """D's losses, scalars by name, from the embeddings of real pictures and their captions."""
    same = negatives.same
    terms = {"d_alignment": losses.info_nce(e["image"], e["text"], loss.temperature, same)}
    if "regions" in e and loss.d_alignment_regions:
        regions, text = e["regions"], e["region_text"]
        terms["d_alignment_regions"] = losses.region_info_nce(regions, text, loss.region_temperature, same)
    if "words" in e and loss.d_alignment_words:
        terms["d_alignment_words"] = _words(e, e, loss, same)
    return terms


def generator_terms(fake: Embeddings, real: Embeddings, loss: LossConfig, negatives: Negatives) -> dict[str, Tensor]:
    """G's losses, scalars by name; `real` has the embeddings of real pictures and of their captions, as constants."""
    same, places = negatives
    terms = {
        "g_alignment_text": losses.info_nce(fake["image"], real["text"], loss.temperature, same),
        "g_alignment_image": losses.info_nce(fake["image"], real["image"], loss.temperature, same),
    }
    if "regions" in fake and loss.g_alignment_regions:
        regions = fake["regions"], real["regions"]
        terms["g_alignment_regions"] = losses.region_info_nce(*regions, loss.region_temperature, same, places)
    if "words" in real and loss.g_alignment_words:
        terms["g_alignment_words"] = _words(fake, real, loss, same)
    return terms


def _words(pictures: Embeddings, captions: Embeddings, loss: LossConfig, same: Tensor) -> Tensor:
    words, mask = captions["words"], captions["word_mask"]
    temperature, sharpness = loss.word_temperature, loss.word_sharpness
    return losses.word_info_nce(pictures["word_regions"], words, mask, temperature, same, sharpness)
