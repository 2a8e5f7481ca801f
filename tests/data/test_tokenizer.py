"""Text to ids: no text crashes it, two trainings give the same tokenizer, and unknown words are reported."""

import json
import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_t2i.data.tokenizer import END, UNKNOWN, Tokenizer, grown, train_tokenizer, words
from dist_t2i.errors import DataError

CAPTIONS = Counter(
    {
        "a red bird on a green branch": 3,
        "A small Café": 2,
        "the bird's wing": 2,
        "medium-dark skin tone": 4,
    }
)
TOKENIZER = train_tokenizer(CAPTIONS, 300)


def test_words():
    assert words("A medium-dark Bird's wing, (two)!") == ["a", "medium", "dark", "bird's", "wing", "two"]
    assert words("rescue worker’s 🥇🥇") == ["rescue", "worker's", "🥇", "🥇"]
    assert words("") == words(" ,.- ") == []


def test_same_captions_same_file():
    again = train_tokenizer(Counter(dict(reversed(CAPTIONS.items()))), 300)
    assert again.text == TOKENIZER.text


def test_encode_shapes_padding_and_end():
    tokens, lengths = TOKENIZER.encode(["a red bird", "", "bird " * 50], max_tokens=8)
    assert tokens.shape == (3, 8) and str(tokens.dtype) == "torch.int64" == str(lengths.dtype)
    assert lengths[1] == 1 and tokens[1].tolist() == [END] + [0] * 7
    assert lengths[2] == 8 and tokens[2, -1] == END
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        assert row[length - 1] == END and not any(row[length:])


def test_case_and_unicode_form_do_not_matter():
    assert TOKENIZER.ids("CAFE\u0301") == TOKENIZER.ids("café")
    assert UNKNOWN not in TOKENIZER.ids("Café")


def test_unknown_words():
    assert TOKENIZER.unknown_words("a Red zebra and another zebra 🥇 鳥") == ["zebra", "and", "another", "🥇", "鳥"]
    assert TOKENIZER.unknown_words("the bird’s wing") == []
    assert UNKNOWN in TOKENIZER.ids("鳥")


@given(st.text(max_size=300))
def test_any_text_encodes(text):
    ids = TOKENIZER.ids(text)
    assert ids[-1] == END and all(0 < number < TOKENIZER.vocab_size for number in ids)
    TOKENIZER.unknown_words(text)


def test_save_load_pickle(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for loaded in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(TOKENIZER))):
        assert loaded == TOKENIZER
        assert loaded.known_words == TOKENIZER.known_words
        assert loaded.ids("a red bird") == TOKENIZER.ids("a red bird")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"known_words": [], "tokenizers": {}}', "\udcff"])
def test_not_a_tokenizer(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match="tokenizer"):
        Tokenizer.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_grown_tokenizer_keeps_the_ids_and_knows_the_new_words():
    new = train_tokenizer(
        Counter({"a crimson zebra": 3, "the zebra's crimson stripes, très rouge": 2, "a red bird": 1})
    )
    both = grown(TOKENIZER, new)
    old_ids, ids = (json.loads(t.text)["tokenizers"]["model"]["vocab"] for t in (TOKENIZER, both))
    assert {token: ids[token] for token in old_ids} == old_ids
    assert sorted(ids.values()) == list(range(both.vocab_size)) and both.vocab_size > TOKENIZER.vocab_size
    assert both.known_words == TOKENIZER.known_words | new.known_words
    assert UNKNOWN in TOKENIZER.ids("zebra") and both.ids("zebra") == (ids["zebra"], END)
    assert both.ids("the bird's wing") == TOKENIZER.ids("the bird's wing")
    text_of = {number: token for token, number in ids.items()}
    assert "".join(text_of[part] for part in both.parts[ids["zebra"]]) == "zebra"
    assert ids["z"] not in both.parts and grown(TOKENIZER, TOKENIZER).text == TOKENIZER.text


@given(st.lists(st.text("abc é", min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 3))
def test_every_token_of_the_new_set_is_one_token(texts, repeats):
    """Also where the old merges divide the text of a token in another way."""
    first = train_tokenizer(Counter({"abcabc bcab caab é": 3}), 40)
    new = train_tokenizer(Counter(dict.fromkeys(texts, repeats)), 60)
    both = grown(first, new)
    for token in json.loads(new.text)["tokenizers"]["model"]["vocab"]:
        if not token.startswith("["):
            assert len(both.ids(token)) == 2, token
