"""Converts text to token ids by a byte-pair encoding that is learned from the training captions.

A tokenizer is one file, `tokenizer.json`: `{"known_words": [...], "tokenizers": {...}}`. Every run folder and every
exported model has a copy of this file. The key `tokenizers` holds a file of the `tokenizers` library, which accepts no
further keys at the top level. `known_words` lists the words of the training captions, so that the unknown words of a
prompt can be reported.

Text is NFC-normalized and lower-cased. A run of characters that occur in no training caption becomes one `unknown`
token, so every text can be encoded. Every text ends with the `end` token; the empty text is only that token.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.errors import DataError
from dist_t2i.storage.clients import FROM_ENVIRONMENT, StorageOptions
from dist_t2i.storage.shard_file import read_file, reason_of

if TYPE_CHECKING:
    import torch

UNKNOWN, END = 1, 2
SPECIAL = ("[PAD]", "[UNK]", "[END]")
MAX_CHARACTERS = 2_000
"""Texts are cut to this many characters before encoding. `max_tokens` tokens represent fewer characters."""
_CACHED_TEXTS = 200_000


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case. A word is a run of letters, digits and apostrophes between them.
    Punctuation, including hyphens, separates words. Each non-ASCII symbol, such as an emoji, is a word of its own."""
    spaced = ""
    for char in unicodedata.normalize("NFC", text).lower().replace("’", "'"):
        kind = unicodedata.category(char)[0]
        if kind in "LMN" or char == "'":
            spaced += char
        else:
            spaced += f" {char} " if kind == "S" and ord(char) > 127 else " "
    return [word for part in spaced.split() if (word := part.strip("'"))]


@dataclass(unsafe_hash=True, repr=False)
class Tokenizer:
    """Converts texts to ids: 0 means padding, 1 unknown, 2 end, and larger ids learned tokens. Tokenizers with equal
    files are equal."""

    text: str
    """The content of a tokenizer.json. A text that is not a tokenizer.json raises DataError."""

    def __post_init__(self) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        try:
            content = json.loads(self.text)
            self._library = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizers"]))
            self.known_words = frozenset(content["known_words"])
        except Exception as error:  # the library raises plain Exception
            raise DataError(str(error)) from error
        if tuple(self._library.id_to_token(i) for i in range(len(SPECIAL))) != SPECIAL:
            raise DataError(f"not a tokenizer of this project: its first tokens must be {' '.join(SPECIAL)}")
        self._cached: dict[str, tuple[int, ...]] = {}

    @classmethod
    def load(cls, path: str | Path, options: StorageOptions = FROM_ENVIRONMENT) -> Tokenizer:
        """Reads a tokenizer.json, given by its path or URL. Raises DataError."""
        try:
            return cls(read_file(str(path), options).decode("utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {reason_of(error)}") from error
        except (UnicodeError, DataError) as error:
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return self._library.get_vocab_size()

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """Token -> the two tokens that its first merge joins. Characters and special tokens have no parts."""
        model = json.loads(self.text)["tokenizers"]["model"]
        number, parts = model["vocab"], dict[int, tuple[int, int]]()
        for left, right in model["merges"]:
            parts.setdefault(number[left + right], (number[left], number[right]))
        return parts

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.text,)

    def ids(self, text: str) -> tuple[int, ...]:
        """All ids of a text, including the final `end`, without truncation to a maximal number of tokens."""
        ids = self._cached.get(text)
        if ids is None:
            ids = (*self._library.encode(text[:MAX_CHARACTERS]).ids, END)
            if len(self._cached) < _CACHED_TEXTS:
                self._cached[text] = ids
        return ids

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B, max_tokens], padded with 0, and lengths int64 [B], at least 1. A text that is too long loses
        its last tokens but keeps its `end`."""
        import numpy
        import torch

        tokens = numpy.zeros((len(texts), max_tokens), dtype=numpy.int64)
        lengths = numpy.zeros(len(texts), dtype=numpy.int64)
        for row, text in enumerate(texts):
            ids = self.ids(text)
            lengths[row] = length = min(len(ids), max_tokens)
            tokens[row, :length] = (*ids[: length - 1], END)
        return torch.from_numpy(tokens), torch.from_numpy(lengths)

    def unknown_words(self, text: str) -> list[str]:
        """The distinct words of `text` that occur in no training caption, in the order of the text."""
        return [word for word in dict.fromkeys(words(text)) if word not in self.known_words]


def train_tokenizer(counts: Counter[str], vocabulary: int = 4096) -> Tokenizer:
    """Trains a tokenizer of at most `vocabulary` tokens. `counts` maps each caption to the number of its occurrences.
    Equal counts always give equal files. Tokens do not mark the beginning of a word, because the library would number
    marked tokens at random."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    library = Library(models.BPE(unk_token=SPECIAL[UNKNOWN], fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = _alphabet(counts, limit=max(vocabulary // 4, 64))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False
    )
    trainer.initial_alphabet, trainer.limit_alphabet = alphabet, len(alphabet)
    ordered = sorted(counts)
    library.train_from_iterator((text for text in ordered for _ in range(counts[text])), trainer=trainer)
    known = sorted({word for text in ordered for word in words(text)})
    content = {"known_words": known, "tokenizers": json.loads(library.to_str())}
    return Tokenizer(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _alphabet(counts: Counter[str], limit: int) -> list[str]:
    """The `limit` most frequent characters. Code points break ties, which the library breaks at random."""
    frequencies: Counter[str] = Counter()
    for text, count in counts.items():
        for char in "".join(unicodedata.normalize("NFC", text).lower().split()):
            frequencies[char] += count
    return sorted(sorted(frequencies), key=lambda char: -frequencies[char])[:limit]


def grown(old: Tokenizer, new: Tokenizer) -> Tokenizer:
    """`old`, extended by the tokens, merges and known words of `new`.

    The tokens of `old` keep their ids; added tokens get the next ids, in the order of `new`. The text of every token of
    `new` is one token of the result. If earlier merges divide this text in another way than `new` does, added merges
    join the resulting parts from left to right, and each joined part becomes a token.
    """
    content, other = json.loads(old.text), json.loads(new.text)
    model, added = content["tokenizers"]["model"], other["tokenizers"]["model"]["vocab"]
    vocabulary, merges = model["vocab"], model["merges"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    for token in sorted(set(added) - set(SPECIAL), key=added.__getitem__):
        pieces = _pieces(token, ranks)
        if len(pieces) == 1:
            vocabulary.setdefault(token, len(vocabulary))
        while len(pieces) > 1:
            left, right = pieces[:2]
            ranks[left, right] = len(ranks)
            merges.append([left, right])
            vocabulary.setdefault(left + right, len(vocabulary))
            pieces = _pieces(token, ranks)
    content["known_words"] = sorted(old.known_words | new.known_words)
    return Tokenizer(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _pieces(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Divides a text as the library does: the leftmost pair with the lowest rank is joined until no pair has a rank."""
    pieces = list(text)
    while known := [(ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, at = min(known)
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    return pieces
