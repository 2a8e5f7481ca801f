"""What a manifest says about the captions of a split, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dist_t2i.data.tokenizer import Tokenizer, words


def caption_statistics(captions: Sequence[Sequence[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Numbers about the captions of one split, given those of each picture."""
    texts = [text for one in captions for text in one]
    tokens = sorted(len(tokenizer.ids(text)) for text in texts)
    said = Counter(word for text in texts for word in words(text))
    lengths = [len(words(text)) for text in texts]
    return {
        "count": len(texts),
        "distinct": len(set(texts)),
        "per_picture": {
            "mean": round(len(texts) / max(1, len(captions)), 3),
            "max": max(map(len, captions), default=0),
        },
        "words": {"mean": round(sum(lengths) / max(1, len(texts)), 2), "max": max(lengths, default=0)},
        "tokens": {
            "mean": round(sum(tokens) / max(1, len(tokens)), 2),
            "p99": tokens[int(len(tokens) * 0.99)] if tokens else 0,
            "max": tokens[-1] if tokens else 0,
        },
        "distinct_words": len(said),
        "words_not_in_train": sum(word not in tokenizer.known_words for word in said),
        "frequent_words": [word for word, _ in sorted(said.items(), key=lambda pair: (-pair[1], pair[0]))[:20]],
    }
