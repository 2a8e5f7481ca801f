"""Text to token ids: a byte-pair encoding learned from the training captions, and the words they contain.

One file, `tokenizer.json`, that travels with every run and exported model:
`{"known_words": [...], "tokenizers": {...}}`. The second is what the `tokenizers` library writes (it refuses further
keys, hence the wrapper); the first is every word of the training captions, so that a prompt can be told which of its
words were never seen.

Text is NFC-normalised and lower-cased; letters that no training caption has become one `unknown` token a run, so
nothing that a person can type fails to encode. Every text ends with the `end` token, an empty one is just that.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_t2i.errors import DataError

if TYPE_CHECKING:
    import torch

PAD, UNKNOWN, END = 0, 1, 2
SPECIAL = ("[PAD]", "[UNK]", "[END]")
MAX_CHARACTERS = 2_000
"""A text is cut after this many characters before it is encoded: far more than `max_tokens` can hold."""
_REMEMBERED = 200_000


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, in order: runs of letters, digits and inner apostrophes, single symbols.

    Hyphens and other punctuation separate. A symbol that is no punctuation, such as an emoji, is a word of its own.
    """
    found: list[str] = []
    run = ""
    for char in unicodedata.normalize("NFC", text).lower().replace("’", "'") + " ":
        kind = unicodedata.category(char)[0]
        if kind in "LMN" or (char == "'" and run):
            run += char
            continue
        if run:
            found.append(run.rstrip("'"))
            run = ""
        if kind == "S" and ord(char) > 127:
            found.append(char)
    return found


class Tokenizer:
    """Ids: 0 pad, 1 unknown, 2 end, then the learned pieces. Equal to another one when their files are."""

    def __init__(self, text: str) -> None:
        """`text`: the contents of a tokenizer.json. Raises DataError when it is none."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        try:
            written = json.loads(text)
            self._library = tokenizers.Tokenizer.from_str(json.dumps(written["tokenizers"]))
            self.known_words = frozenset(written["known_words"])
        except Exception as error:  # the library raises plain Exception
            raise DataError(str(error)) from error
        if tuple(self._library.id_to_token(i) for i in range(len(SPECIAL))) != SPECIAL:
            raise DataError(f"not one of our tokenizers: its first tokens should be {' '.join(SPECIAL)}")
        self.text = text
        self._remembered: dict[str, tuple[int, ...]] = {}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, or a folder that holds one. Raises DataError."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except (UnicodeError, DataError) as error:
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return self._library.get_vocab_size()

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.text,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def ids(self, text: str) -> tuple[int, ...]:
        """All ids of one text, `end` included, uncut."""
        found = self._remembered.get(text)
        if found is None:
            found = (*self._library.encode(text[:MAX_CHARACTERS]).ids, END)
            if len(self._remembered) < _REMEMBERED:
                self._remembered[text] = found
        return found

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B, max_tokens], zero-padded, and lengths int64 [B], each 1 to `max_tokens`.

        A text that is too long loses its tail, never its `end`.
        """
        import numpy
        import torch

        tokens = numpy.zeros((len(texts), max_tokens), dtype=numpy.int64)
        lengths = numpy.zeros(len(texts), dtype=numpy.int64)
        for row, text in enumerate(texts):
            ids = self.ids(text)
            ids = ids if len(ids) <= max_tokens else (*ids[: max_tokens - 1], END)
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return torch.from_numpy(tokens), torch.from_numpy(lengths)

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that no training caption had, each once, in order."""
        return [word for word in dict.fromkeys(words(text)) if word not in self.known_words]


def train_tokenizer(counts: Counter[str], vocabulary: int = 4096) -> Tokenizer:
    """A tokenizer for captions counted in `counts`, of at most `vocabulary` tokens; the same file for the same counts.

    Words that end up as one token are those said at least twice, the most frequent first. Pieces carry no mark of
    where a word begins: the library numbers marked pieces by chance, and the file would not be the same twice.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    library = Library(models.BPE(unk_token=SPECIAL[UNKNOWN], fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = _alphabet(counts, limit=max(vocabulary // 4, 64))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    ordered = sorted(counts)
    library.train_from_iterator((text for text in ordered for _ in range(counts[text])), trainer=trainer)
    known = sorted({word for text in ordered for word in words(text)})
    written = {"known_words": known, "tokenizers": json.loads(library.to_str())}
    return Tokenizer(json.dumps(written, ensure_ascii=False, indent=1) + "\n")


def _alphabet(counts: Counter[str], limit: int) -> list[str]:
    """The most frequent characters (ties by code point: the library breaks them by chance)."""
    seen: Counter[str] = Counter()
    for text, count in counts.items():
        for char in unicodedata.normalize("NFC", text).lower():
            if not char.isspace():
                seen[char] += count
    return sorted(sorted(seen), key=lambda char: -seen[char])[:limit]
