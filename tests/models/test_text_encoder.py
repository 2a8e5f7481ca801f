"""S_G and S_D: shapes, masks, and independent rows."""

import pytest
import torch

from dist_t2i.models.config import TextConfig
from dist_t2i.models.frozen_text import CaptionTable, PretrainedEncoder
from dist_t2i.models.text_encoder import build_text_encoder

VOCABULARY, TOKENS, WIDTH = 40, 9, 32


def captions(rows: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, TOKENS, 4, 2, 6])[:rows]
    tokens = torch.randint(2, VOCABULARY, (rows, TOKENS), generator=generator)
    return tokens * (torch.arange(TOKENS) < lengths[:, None]), lengths


@pytest.fixture(params=["lstm", "transformer"])
def encoder(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_text_encoder(TextConfig(encoder=request.param, embedding=WIDTH, layers=2, heads=4), VOCABULARY, TOKENS)


def test_shapes_mask_and_padding(encoder):
    tokens, lengths = captions()
    sentence, words, mask = encoder(tokens, lengths)
    assert encoder.width == WIDTH
    assert sentence.shape == (5, WIDTH)
    assert words.shape == (5, TOKENS, WIDTH)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == lengths.tolist()
    assert words[~mask].abs().max() == 0


def test_a_row_depends_on_its_own_caption_only(encoder):
    tokens, lengths = captions()
    whole = encoder(tokens, lengths)
    for row in range(5):
        alone = encoder(tokens[row : row + 1], lengths[row : row + 1])
        torch.testing.assert_close(alone.sentence[0], whole.sentence[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.words[0], whole.words[row], rtol=1e-5, atol=1e-6)


def test_tokens_behind_the_end_change_nothing(encoder):
    tokens, lengths = captions()
    dirty = torch.where(torch.arange(TOKENS) < lengths[:, None], tokens, 7)
    torch.testing.assert_close(encoder(dirty, lengths).sentence, encoder(tokens, lengths).sentence)


def test_order_of_words_matters(encoder):
    forward = encoder(torch.tensor([[5, 6, 7]]), torch.tensor([3])).sentence
    backward = encoder(torch.tensor([[7, 6, 5]]), torch.tensor([3])).sentence
    assert (forward - backward).abs().max() > 0.01


def test_gradient_reaches_every_parameter_and_no_unused_word(encoder):
    tokens, lengths = captions()
    out = encoder(tokens, lengths)
    (out.sentence.square().sum() + out.words.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    used = torch.zeros(VOCABULARY, dtype=torch.bool)
    used[tokens.unique()] = True
    used[0] = False
    assert encoder.embedding.weight.grad.abs().sum(1).gt(0).equal(used)


def test_frozen_text_has_nothing_to_learn(encoder):
    frozen = PretrainedEncoder(encoder)
    tokens, lengths = captions()
    out = frozen(tokens, lengths)
    assert frozen.width == WIDTH
    assert not out.sentence.requires_grad and not out.words.requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())


def test_caption_table_looks_up_by_tokens_and_averages_for_the_unknown():
    tokens, lengths = captions()
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    table = CaptionTable(vectors, tokens, lengths)
    picked = torch.tensor([3, 1])
    out = table(tokens[picked], lengths[picked])
    assert out.sentence.equal(vectors[picked])
    assert out.words.shape == (2, 1, 3) and out.mask.all()
    stranger = table(torch.full((1, TOKENS), 39), torch.tensor([3])).sentence
    torch.testing.assert_close(stranger[0], vectors.mean(0))
