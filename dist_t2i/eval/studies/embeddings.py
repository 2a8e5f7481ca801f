"""What a model's text embeddings have learned: nearest words, linear probes with their baselines, a map.

Probes learn from captions that the model was trained on and are scored on held-out ones (or, in a set without held-out
splits, on a fifth of the captions by their hash). Which there are depends on the set:

* *skin tone*: captions with exactly one;
* *gender*: captions with words of one gender, or a word for people of none;
* *object*: a person without tone and gender ("pilot"), where the set has tones: held-out captions show it in a tone that
  training never had it in; elsewhere, which of the set's most frequent words a caption has, if it has one of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_t2i.data.stream.batch import caption_id
from dist_t2i.data.tokenizer import words
from dist_t2i.errors import UserError
from dist_t2i.eval import metrics
from dist_t2i.eval.skin_tones import group_of, split_tone, tone_of
from dist_t2i.eval.studies import probes
from dist_t2i.models.text_encoder import build_text_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

MOST = 4000
"""Captions looked at, of each side."""
LEARNED = 1000
"""Captions that a probe learns from at most, evenly spread."""
MANY = 20
"""Of a property with more classes, only those that held-out captions have."""
GENDERS = {
    "male": frozenset("man men boy father prince king mr he".split()),
    "female": frozenset("woman women girl mother princess queen mrs she".split()),
    "neither": frozenset("person people child adult baby".split()),
}
_GENDERED = frozenset(word for group in GENDERS.values() for word in group)
_DULL = frozenset("a an the of in on with and to is are at by for from this that it its has have".split())


@dataclass(frozen=True)
class Captions:
    """Captions to learn probes from, and held-out ones; the pictures of the latter where they come with a set."""

    train: list[str]
    test: list[str]
    pictures: list[Image]
    """Of the held-out captions, the same order."""
    split: str
    """What the held-out ones are."""


@dataclass(frozen=True)
class Probe:
    """How well one property is read from each embedding."""

    name: str
    classes: tuple[str, ...]
    train: int
    test: int
    chance: float
    """What always saying the most frequent class of the training captions gets."""
    accuracy: Mapping[str, tuple[float, float, float]]
    """Embedding or baseline -> value, and its 95% bootstrap interval over groups of held-out captions."""
    share: Mapping[str, float | None]
    """Embedding or baseline -> how much of its variance over the held-out captions the classes account for."""


@dataclass(frozen=True)
class Study:
    """All that was found."""

    names: tuple[str, ...]
    """The embeddings that the model has: S_G and S_D, or the one there is."""
    captions: Captions
    probes: tuple[Probe, ...]
    neighbours: Mapping[str, Mapping[str, Sequence[str]]]
    """embedding -> word (or caption) -> its nearest."""
    maps: Mapping[str, tuple[Tensor, tuple[float, float]]]
    """embedding -> places [N, 2] of the held-out captions, and shares of the variance."""
    labels: Mapping[str, Sequence[str]]
    """property -> class of each held-out caption, "" where it has none."""
    alike: float | None
    """Linear CKA of S_G and S_D on the held-out captions."""

    def as_json(self) -> dict[str, Any]:
        return {
            "embeddings": list(self.names),
            "held_out": {"split": self.captions.split, "captions": len(self.captions.test)},
            "probes": [
                {
                    **{"name": one.name, "classes": list(one.classes), "train": one.train, "test": one.test},
                    **{
                        "chance": one.chance,
                        "variance_share": dict(one.share),
                        "accuracy": {name: list(v) for name, v in one.accuracy.items()},
                    },
                }
                for one in self.probes
            ],
            "neighbours": {name: {k: list(v) for k, v in found.items()} for name, found in self.neighbours.items()},
            "variance_shares": {name: list(shares) for name, (_, shares) in self.maps.items()},
            "cka": self.alike,
        }


def embeddings_of(model: TextToImage) -> dict[str, str]:
    """Name -> which (as in `embed_text`) of the embeddings that a model has."""
    mode = model.config.text.mode
    return {"dual": {"S_G": "g", "S_D": "d"}, "shared": {"shared": "g"}, "frozen": {"given": "d"}}[mode]


def study(model: TextToImage, data: ShardSet, *, queries: Sequence[str] = (), seed: int = 0) -> Study:
    """Looks at the embeddings of a model on a set's captions. Raises UserError when there are too few to say anything."""
    captions = gather(data)
    if len(captions.train) < 20 or len(captions.test) < 8:
        raise UserError(f"{data.folder}: too few captions to probe ({len(captions.train)} and {len(captions.test)})")
    which = embeddings_of(model)
    sides = captions.train, captions.test
    spaces = {name: tuple(model.embed_text(texts, one) for texts in sides) for name, one in which.items()}
    maps = {name: probes.plane(test) for name, (_, test) in spaces.items()}
    pair = [test for _, test in spaces.values()]
    baselines = {
        "bag of words": probes.bag_of_words(*sides),
        "untrained encoder": tuple(_untrained(model, texts, seed) for texts in sides),
    }
    labels = {name: (label(captions.train), label(captions.test)) for name, label in properties(captions).items()}
    return Study(
        names=tuple(which),
        captions=captions,
        probes=tuple(
            found
            for name, (train, test) in labels.items()
            if (found := run_probe(name, train, test, captions.test, {**spaces, **baselines})) is not None
        ),
        neighbours={name: neighbours(model, one, captions, queries) for name, one in which.items()},
        maps=maps,
        labels={name: test for name, (_, test) in labels.items()},
        alike=probes.alike(*pair) if len(pair) == 2 else None,
    )


def gather(data: ShardSet) -> Captions:
    """The captions of the training split, and the first captions of the first held-out one."""
    from dist_t2i.data.shard_set import BadSample

    samples = data.samples("train")
    train = [caption for i in range(min(MOST, len(samples))) for caption in samples[i].captions]
    train = list(dict.fromkeys(train))[:MOST]
    held = next((name for name in data.splits if name.startswith("test")), "")
    if not held:
        aside = [text for text in train if caption_id(text) % 5 == 0]
        return Captions([text for text in train if caption_id(text) % 5], aside, [], "a fifth of the captions")
    found, pictures = [], []
    samples = data.samples(held)
    for i in range(min(MOST, len(samples))):
        try:
            picture = samples[i].image.convert("RGB")
        except (BadSample, OSError):
            continue
        found.append(samples[i].captions[0])
        pictures.append(picture)
    return Captions(train, found, pictures, held)


# ---- properties ------------------------------------------------------------------------------------------------------


def properties(captions: Captions) -> dict[str, Any]:
    """Name -> a function from captions to their classes, "" for none."""
    toned = sum(bool(tone_of(text)) for text in captions.train)
    objects = _objects if toned >= 20 else _frequent(captions.train)
    return {
        "skin tone": lambda texts: [tone_of(text) for text in texts],
        "gender": lambda texts: [gender_of(text) for text in texts],
        "object": lambda texts: [objects(text) for text in texts],
    }


def gender_of(caption: str) -> str:
    """`male`, `female`, `neither` (people without one), or "" where none or several are named."""
    said = set(words(caption))
    found = [name for name, group in GENDERS.items() if said & group]
    return found[0] if len(found) == 1 else ""


def _objects(caption: str) -> str:
    """Who is shown, without tone and gender: "pilot"; "" for captions without a skin tone."""
    parts = split_tone(caption)
    if parts is None:
        return ""
    return " ".join(word for word in words(parts[0] + parts[2]) if word not in _GENDERED) or "only a person"


def _frequent(train: Sequence[str], most: int = 20):
    """A function from a caption to the one frequent word that it has; "" for none or several."""
    counts = Counter(word for text in train for word in set(words(text)) if word not in _DULL)
    chosen = {word for word, count in counts.most_common(most) if count < 0.5 * len(train)}

    def only(caption: str) -> str:
        found = chosen & set(words(caption))
        return found.pop() if len(found) == 1 else ""

    return only


def run_probe(
    name: str,
    train: Sequence[str],
    test: Sequence[str],
    texts: Sequence[str],
    spaces: Mapping[str, tuple[Tensor, ...]],
) -> Probe | None:
    """The accuracies of one property; None where it has fewer than two classes, or too few captions on a side.

    `train` and `test` are classes, "" for captions that are left out; `texts` the held-out captions themselves.
    """
    known = Counter(label for label in train if label)
    classes = sorted(label for label, count in known.items() if count >= 2)
    if len(classes) > MANY:
        classes = [label for label in classes if label in set(test)]
    index = {label: i for i, label in enumerate(classes)}
    learn = torch.tensor([i for i, label in enumerate(train) if label in index], dtype=torch.long)
    learn = learn[:: -(-len(learn) // LEARNED) or 1]
    ask = torch.tensor([i for i, label in enumerate(test) if label in index], dtype=torch.long)
    if len(classes) < 2 or len(learn) < 20 or len(ask) < 8:
        return None
    wanted, truth = (torch.tensor([index[side[i]] for i in rows]) for side, rows in ((train, learn), (test, ask)))
    weights = metrics.bootstrap_weights([group_of(texts[i]) for i in ask])
    found, shares = {}, {}
    for space, (rows, held) in spaces.items():
        right = (probes.probe(rows[learn], wanted, held[ask], len(classes)) == truth).double()
        low, high = metrics.interval(torch.as_tensor(metrics.weighted_mean(right, weights)))
        found[space] = (right.mean().item(), low, high)
        share = probes.explained(held[ask], truth)
        shares[space] = None if math.isnan(share) else share
    most = index[max(classes, key=lambda label: known[label])]
    chance = (truth == most).double().mean().item()
    return Probe(name, tuple(classes), len(learn), len(ask), chance, found, shares)


@torch.no_grad()
def _untrained(model: TextToImage, texts: Sequence[str], seed: int) -> Tensor:
    """The sentences of an encoder as the configuration describes it, with fresh weights."""
    limit = model.config.data.max_tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_text_encoder(model.config.text, model.tokenizer.vocab_size, limit).eval()
    return torch.cat(
        [encoder(*model.tokenizer.encode(texts[i : i + 64], limit)).sentence for i in range(0, len(texts), 64)]
    )


# ---- neighbours ------------------------------------------------------------------------------------------------------


def neighbours(
    model: TextToImage, which: str, captions: Captions, queries: Sequence[str], count: int = 6, most: int = 600
) -> dict[str, list[str]]:
    """Query -> its nearest among the training captions' words, each embedded as a text of its own.

    A table of captions has no vectors of single words: there, captions and their nearest captions.
    """
    counts = Counter(word for text in captions.train for word in set(words(text)))
    texts = [word for word, n in counts.most_common(most) if n >= 2 and len(word) > 1]
    if has_table(model):
        texts = captions.test[:most]
        queries = [query for query in queries if query in texts]
    chosen = [query for query in queries if query in texts] or _spread([t for t in texts if t not in _DULL], 14)
    if len(texts) < 2:
        return {}
    found = probes.nearest(model.embed_text(texts, which), count)
    return {query: [texts[i] for i in found[texts.index(query)]] for query in chosen}


def has_table(model: TextToImage) -> bool:
    """Whether the text embedding is a table of captions, which cannot embed new text."""
    return model.files.frozen is not None and model.files.frozen.about.get("kind") == "table"


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """The most frequent ones and some of each further part."""
    if len(texts) <= count:
        return list(texts)
    head = list(texts[: count // 2])
    rest = texts[count // 2 : 200]
    return head + [rest[i * len(rest) // (count - len(head))] for i in range(count - len(head))]
