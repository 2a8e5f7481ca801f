"""The discriminator: one trunk, two branches, regions; independent rows; gradients only for the right parameters."""

import pytest
import torch

from dist_t2i.losses import functional as losses
from dist_t2i.models.config import DiscriminatorConfig
from dist_t2i.models.discriminator import Discriminator
from dist_t2i.models.text_encoder import TextEmbedding

TEXT = 24


def build(image_size: int = 32, **changes) -> Discriminator:
    torch.manual_seed(0)
    settings = {
        "channels": (8, 12, 16),
        "embedding": 20,
        "regions": (8, 4),
        "words": 0,
        "region_embedding": 6,
    } | changes
    return Discriminator(DiscriminatorConfig(**settings), image_size, TEXT)


def inputs(image_size: int = 32, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(rows, 3, image_size, image_size, generator=random) * 2 - 1
    return images, torch.randn(rows, TEXT, generator=random)


def text(sentence: torch.Tensor) -> TextEmbedding:
    """Captions with one word each."""
    return TextEmbedding(sentence, sentence[:, None], torch.ones(len(sentence), 1, dtype=torch.bool))


@pytest.mark.parametrize("image_size", [16, 32, 64, 256])
@pytest.mark.parametrize("condition", ["projection", "joint"])
def test_shapes_at_any_size(image_size, condition):
    d = build(image_size, condition=condition, blocks=2)
    images, sentence = inputs(image_size)
    features = d.features(images)
    assert d.adversarial(features, sentence).shape == (4,)
    assert d.align_image(features).shape == d.align_text(sentence).shape == (4, 20)
    assert d.embed_pictures(features)["regions"].shape == (4, 8 * 8 + 4 * 4, 6)
    assert d.embed_captions(text(sentence))["region_text"].shape == (4, 6)


def test_self_attention_and_skips_pass_the_exact_penalty():
    """R1 differentiates twice: every parameter before the logit gets a gradient from it."""
    d = build(self_attention=(8,), skips=True)
    torch.nn.init.normal_(d.self_attentions["8"].mix.weight, std=0.1)  # zero in a fresh network
    images, sentence = inputs()
    images.requires_grad_(True)
    losses.r1(d.adversarial(d.features(images), sentence), images).backward()
    parts = [*d.self_attentions.named_parameters(), *d.skips.named_parameters()]
    assert parts and all(p.grad.abs().sum() > 0 for name, p in parts if name.endswith("weight"))


def test_alignment_embeddings_are_unit_vectors():
    d = build()
    images, sentence = inputs()
    features = d.features(images)
    units = d.embed_pictures(features) | d.embed_captions(text(sentence))
    assert set(units) == {"image", "text", "regions", "region_text"}
    for unit in units.values():
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(unit.shape[:-1]))


@pytest.mark.parametrize("condition", ["projection", "joint"])
def test_rows_are_apart_and_one_pass_serves_two_halves(condition):
    d = build(condition=condition)
    images, sentence = inputs()
    features = d.features(images)
    logits = d.adversarial(features, sentence)
    torch.testing.assert_close(d.adversarial(d.features(images[1:3]), sentence[1:3]), logits[1:3], rtol=1e-4, atol=1e-5)
    half = features.rows(2, 4)
    torch.testing.assert_close(d.adversarial(half, sentence[2:]), logits[2:], rtol=1e-4, atol=1e-5)
    regions = d.embed_pictures(features)["regions"]
    torch.testing.assert_close(d.embed_pictures(half)["regions"], regions[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("condition", ["projection", "joint"])
def test_the_caption_moves_the_logit_but_not_the_trunk(condition):
    d = build(condition=condition)
    images, sentence = inputs()
    features = d.features(images)
    assert (d.adversarial(features, sentence) - d.adversarial(features, sentence.flip(0))).abs().min() > 1e-3


def test_detached_features_carry_no_gradient():
    d = build()
    images, sentence = inputs()
    with torch.no_grad():
        detached = d.features(images)
    assert not detached.pooled.requires_grad and not any(x.requires_grad for x in detached.maps)
    assert d.adversarial(detached, sentence).requires_grad, "the branch itself still learns"


def test_each_branch_reaches_its_own_parameters_and_both_reach_the_trunk():
    adversarial_only, alignment_only, both = (
        {"condition", "realism"},
        {"image_projection", "text_projection"},
        {"stem", "pool"},
    )
    regions_only = {"region_projections", "region_text_projection"}

    def reached(loss) -> set[str]:
        d = build()
        images, sentence = inputs()
        loss(d, d.features(images), sentence).backward()
        return {name.split(".")[0] for name, p in d.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    adversarial = reached(lambda d, f, s: d.adversarial(f, s).square().sum())
    alignment = reached(lambda d, f, s: (d.align_image(f) * d.align_text(s)).sum())
    regions = reached(
        lambda d, f, s: (d.embed_pictures(f)["regions"] * d.embed_captions(text(s))["region_text"][:, None]).sum()
    )
    assert adversarial >= adversarial_only | both and not adversarial & (alignment_only | regions_only)
    assert alignment >= alignment_only | both and not alignment & (adversarial_only | regions_only)
    assert regions >= regions_only | {"stem"} and not regions & (adversarial_only | alignment_only)


def test_regions_must_be_computed_scales():
    with pytest.raises(ValueError, match=r"model\.discriminator\.regions: 32 must be among the scales"):
        build(regions=(32,))
    assert build(regions=()).region_text_projection is None
    with pytest.raises(ValueError, match=r"model\.discriminator\.words: 32 must be among the scales"):
        build(words=32)


def test_words_are_aligned_with_the_positions_of_a_map_of_their_own():
    d, plain = build(words=8), build()
    images, _ = inputs()
    features = d.features(images)
    captions = TextEmbedding(torch.randn(4, TEXT), torch.randn(4, 5, TEXT), torch.ones(4, 5, dtype=torch.bool))
    regions, words = d.embed_pictures(features)["word_regions"], d.embed_captions(captions)["words"]
    assert regions.shape == (4, 64, 6) and words.shape == (4, 5, 6)
    for unit in (regions, words):
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(unit.shape[:-1]))
    torch.testing.assert_close(d.embed_pictures(features.rows(2, 4))["word_regions"], regions[2:])
    with torch.no_grad():
        assert not d.features(images).words.requires_grad
    assert plain.features(images).words is None
    extra = {name for name, _ in d.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert {name.split(".")[0] for name in extra} == {"word_projection", "word_region_projection"}
    assert all(d.state_dict()[name].equal(value) for name, value in plain.state_dict().items())


def test_second_derivative_exists_for_r1():
    d = build()
    images, sentence = inputs()
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(d.adversarial(d.features(images), sentence).sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert d.stem.weight.grad.abs().sum() > 0


def test_the_finest_regions_are_linear_in_the_pixels():
    d = build(regions=(16,))
    a, b = inputs()[0], inputs()[0].flip(0)
    middle = d.features((a + b) / 2).maps[0]
    torch.testing.assert_close(middle, (d.features(a).maps[0] + d.features(b).maps[0]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("condition", ["projection", "joint"])
def test_places_are_judged_one_by_one(condition):
    d = build(patches=8, condition=condition)
    images, sentence = inputs()
    features = d.features(images)
    logits = d.adversarial(features, sentence)
    assert logits.shape == (4, 2 * 64)
    assert (logits[:, :64] == logits[:, :1]).all(), "the whole picture's logit, as often as there are places"
    assert logits[:, 64:].std(dim=1).min() > 0
    torch.testing.assert_close(d.adversarial(features.rows(1, 2), sentence[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
