"""The list of alignments: its losses of D's embeddings. Training code contains no name of an alignment."""

import re

import pytest
import torch

from dist_t2i.config.sections import LossConfig
from dist_t2i.losses.alignment import Negatives, discriminator_terms, generator_terms, wrong_captions
from dist_t2i.models.config import DiscriminatorConfig
from dist_t2i.models.discriminator import Discriminator
from dist_t2i.models.text_encoder import TextEmbedding
from ranks import ROOT

TEXT, ROWS = 24, 4
EVERYTHING = {"channels": (8, 12, 16), "embedding": 20, "regions": (8, 4), "words": 8, "region_embedding": 6}


def embedded(**changes) -> tuple[dict, dict]:
    """The embeddings of some pictures, and of their captions."""
    torch.manual_seed(0)
    d = Discriminator(DiscriminatorConfig(**(EVERYTHING | changes)), 32, TEXT)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    text = TextEmbedding(torch.randn(ROWS, TEXT), torch.randn(ROWS, 5, TEXT) * mask[..., None], mask)
    return d.embed_pictures(d.features(torch.rand(ROWS, 3, 32, 32) * 2 - 1)), d.embed_captions(text)


def terms(pictures: dict, captions: dict, **weights) -> dict:
    every = {name: 1.0 for name in vars(LossConfig()) if re.match(r"[dg]_alignment", name)}
    loss, negatives = LossConfig(**(every | weights)), Negatives(torch.eye(ROWS, dtype=torch.bool))
    real = {name: value.detach() for name, value in {**pictures, **captions}.items()}
    found = discriminator_terms({**pictures, **captions}, loss, negatives)
    return {**found, **generator_terms(pictures, real, loss, negatives)}


def test_every_term_is_a_scalar_with_a_weight_of_its_name():
    found = terms(*embedded())
    weights = {name for name in vars(LossConfig()) if re.match(r"[dg]_alignment", name)}
    assert set(found) == weights
    assert all(value.shape == () and value.requires_grad for value in found.values())


@pytest.mark.parametrize(("kind", "off"), [("regions", {"regions": ()}), ("words", {"words": 0})])
def test_an_alignment_is_left_out_without_its_embeddings_or_its_weight(kind, off):
    names = {f"d_alignment_{kind}", f"g_alignment_{kind}"}
    both = embedded()
    assert set(terms(*both)) - set(terms(*both, **dict.fromkeys(names, 0.0))) == names
    without = embedded(**off)
    assert set(terms(*both)) - set(terms(*without)) == names
    assert not any(re.match(rf"{kind.removesuffix('s')}(s|_)", name) for part in without for name in part)


def test_every_embedding_has_one_row_a_picture():
    for part in embedded():
        assert {len(value) for value in part.values()} == {ROWS}


def test_who_trains_knows_no_alignment_by_name():
    names = {name for part in embedded() for name in part}
    for file in ("training/gan.py", "losses/global_batch.py"):
        source = (ROOT / "dist_t2i" / file).read_text()
        assert not [name for name in names if f'"{name}"' in source] and "alignment_" not in source


def test_the_wrong_caption_is_the_most_similar_one_of_its_group():
    picture, caption = torch.eye(8), torch.eye(8)
    caption[3] = 0.9 * picture[0] + 0.1 * picture[3]  # similar to picture 0, in its group of four
    caption[6] = 0.99 * picture[0]  # more similar, but in the other group
    matching = torch.eye(8, dtype=torch.bool)
    wrong, right = wrong_captions(picture @ caption.T, matching, 4)
    assert wrong[0] == 3 and not right.any() and (wrong // 4 == torch.arange(8) // 4).all()
    matching[0, 3] = matching[3, 0] = True  # the same caption twice
    assert wrong_captions(picture @ caption.T, matching, 4)[0][0] in (1, 2)
    neighbors, matched = wrong_captions(picture @ caption.T, matching | matching.roll(1, 0), 2)
    assert neighbors.equal(torch.arange(8) ^ 1) and matched.any(), "a group of two has one candidate"
