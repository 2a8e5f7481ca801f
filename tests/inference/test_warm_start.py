"""A model whose vocabulary grows: old rows stay, new rows start from their parts."""

from collections import Counter

import pytest
import torch

from dist_t2i.data.tokenizer import grown, train_tokenizer
from dist_t2i.inference.model_files import read_model
from dist_t2i.inference.warm_start import about, started_from, with_tokens
from models_on_disk import write_run

NEW = train_tokenizer(Counter({"ångström apples": 3, "quartz cook": 2}), 200)


@pytest.mark.parametrize("mode", ["dual", "shared"])
def test_old_rows_stay_and_new_rows_are_the_means_of_their_parts(tmp_path, mode):
    model = read_model(write_run(tmp_path / "run", f"text.mode={mode}"))
    tokenizer = grown(model.tokenizer, NEW)
    larger, again, other = (with_tokens(model, tokenizer, seed) for seed in (0, 0, 1))
    sides = [(name, getattr(model, name), getattr(larger, name)) for name in ("generator", "discriminator")]
    tables = [(side, name) for side, old, _ in sides for name in old if name.endswith(".embedding.weight")]
    assert len(tables) == 2
    for side, name in tables:
        old, new = getattr(model, side)[name], getattr(larger, side)[name]
        assert torch.equal(new[: len(old)], old) and new.shape == (tokenizer.vocab_size, old.shape[1])
        assert torch.equal(new, getattr(again, side)[name])
        characters = [token for token in range(len(old), len(new)) if token not in tokenizer.parts]
        assert characters and len(characters) < len(new) - len(old)
        assert not torch.equal(new[characters], getattr(other, side)[name][characters])
        assert new[characters].std() == pytest.approx(old[1:].std().item(), rel=0.4)
        for token in set(range(len(old), len(new))) - {*characters}:
            assert torch.equal(new[token], new[list(tokenizer.parts[token])].mean(0))
    for _, old, new in sides:
        assert all(torch.equal(new[name], old[name]) for name in old if not name.endswith(".embedding.weight"))


def test_what_a_run_records_about_the_model(tmp_path):
    model = read_model(write_run(tmp_path / "run", images=1280))
    assert about(model) == {"name": "run", "weights_sha256": model.sha256(), "images": 1280}
    assert str(tmp_path) not in started_from(about(model))
