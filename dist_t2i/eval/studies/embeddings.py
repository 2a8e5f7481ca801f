"""Studies a model's text embeddings: nearest words, linear probes with their baselines, and a map.

Probes learn from captions of the training split and are scored on held-out captions. In sets without held-out
splits, a hash selects a fifth of the captions to be held out. The probed properties depend on the set:

* *skin tone*, for captions that name exactly one tone;
* *gender*, for captions whose words for persons are all male, all female, or all without gender;
* *object*: in sets with skin tones, the role without tone and gender ("pilot"). A held-out caption combines a role and
  a tone that no training caption combines. In other sets, the only frequent word of a caption.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_t2i.data.shard_set import BadSample
from dist_t2i.data.stream.batch import caption_id
from dist_t2i.data.tokenizer import words
from dist_t2i.errors import UserError
from dist_t2i.eval import metrics
from dist_t2i.eval.skin_tones import group_of, split_tone, tone_of
from dist_t2i.eval.studies import probes
from dist_t2i.inference.pipeline import fresh_text_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

EMBEDDINGS = {"dual": {"S_G": "g", "S_D": "d"}, "shared": {"shared": "g"}, "frozen": {"given": "d"}}
"""text.mode -> name of an embedding of the model -> the argument `which` that selects the embedding in `embed_text`."""
MOST = 4000
"""Maximum number of training captions, and maximum number of held-out captions."""
LEARNED = 1000
"""Maximum number of captions from which a probe learns; they are evenly spaced among the training captions."""
MANY = 20
"""If a property has more classes than this, only the classes that occur in held-out captions are probed."""
GENDERS = {
    "male": frozenset("man men boy father prince king mr he".split()),
    "female": frozenset("woman women girl mother princess queen mrs she".split()),
    "neither": frozenset("person people child adult baby".split()),
}
_GENDERED = frozenset(word for group in GENDERS.values() for word in group)
_STOP_WORDS = frozenset("a an the of in on with and to is are at by for from this that it its has have".split())


@dataclass(frozen=True)
class Captions:
    """The captions with which probes are trained (`train`) and scored (`test`)."""

    train: list[str]
    test: list[str]
    pictures: list[Image]
    """The pictures of the held-out captions, in the same order; empty in sets without held-out splits."""
    split: str


@dataclass(frozen=True)
class Probe:
    """How accurately a linear probe reads one property from each embedding."""

    name: str
    classes: tuple[str, ...]
    train: int
    test: int
    chance: float
    """Accuracy of always answering the most frequent class of the training captions."""
    accuracy: Mapping[str, tuple[float, float, float]]
    """Embedding or baseline -> (value, low, high), with the 95% bootstrap interval over groups of held-out captions."""
    variance_share: Mapping[str, float | None]
    """Embedding or baseline -> share of the variance over the held-out captions that the classes explain."""


@dataclass(frozen=True)
class Study:
    """All results of the study."""

    names: tuple[str, ...]
    """The model's embeddings: S_G and S_D, or its only embedding."""
    captions: Captions
    probes: tuple[Probe, ...]
    neighbours: Mapping[str, Mapping[str, Sequence[str]]]
    """embedding -> word (or caption) -> the nearest other words (or captions)."""
    maps: Mapping[str, tuple[Tensor, tuple[float, float]]]
    """embedding -> positions [N, 2] of the held-out captions, and the share of variance along each axis."""
    labels: Mapping[str, Sequence[str]]
    """property -> class of each held-out caption, or "" if the caption has no class."""
    alike: float | None
    """Linear CKA of S_G and S_D on the held-out captions."""

    def as_json(self) -> dict[str, Any]:
        return {
            "embeddings": list(self.names),
            "held_out": {"split": self.captions.split, "captions": len(self.captions.test)},
            "probes": [asdict(probe) for probe in self.probes],
            "neighbours": self.neighbours,
            "variance_shares": {name: shares for name, (_, shares) in self.maps.items()},
            "cka": self.alike,
        }


def study(model: TextToImage, data: ShardSet, *, queries: Sequence[str] = ()) -> Study:
    """Studies a model's embeddings of a set's captions, and lists the neighbours of `queries`. Raises UserError."""
    captions = gather(data)
    sides = captions.train, captions.test
    if len(captions.train) < 20 or len(captions.test) < 8:
        raise UserError(f"{data.folder}: too few captions ({len(captions.train)} train, {len(captions.test)} held out)")
    embeddings = EMBEDDINGS[model.config.text.mode]
    spaces = {name: tuple(model.embed_text(texts, which) for texts in sides) for name, which in embeddings.items()}
    tests = [test for _, test in spaces.values()]
    untrained = tuple(_untrained(model, texts) for texts in sides)
    baselines = {"bag of words": probes.bag_of_words(*sides), "untrained encoder": untrained}
    has_tones = sum(bool(tone_of(text)) for text in captions.train) >= 20
    objects = _objects if has_tones else _frequent(captions.train)
    properties = {"skin tone": tone_of, "gender": gender_of, "object": objects}
    labels = {name: [[label(text) for text in texts] for texts in sides] for name, label in properties.items()}
    results = [run_probe(name, a, b, captions.test, spaces | baselines) for name, (a, b) in labels.items()]
    return Study(
        names=tuple(embeddings),
        captions=captions,
        probes=tuple(probe for probe in results if probe is not None),
        neighbours={name: neighbours(model, which, captions, queries) for name, which in embeddings.items()},
        maps={name: probes.plane(test) for name, (_, test) in spaces.items()},
        labels={name: test for name, (_, test) in labels.items()},
        alike=probes.alike(*tests) if len(tests) == 2 else None,
    )


def gather(data: ShardSet) -> Captions:
    """The captions of the training split, and the first captions of the first held-out split."""
    samples = data.samples("train")
    texts = (caption for i in range(min(MOST, len(samples))) for caption in samples[i].captions)
    train = list(dict.fromkeys(texts))[:MOST]
    split = next((name for name in data.splits if name.startswith("test")), "")
    if not split:
        held_out = [text for text in train if caption_id(text) % 5 == 0]
        return Captions([t for t in train if caption_id(t) % 5], held_out, [], "a fifth of the captions")
    test, pictures, samples = [], [], data.samples(split)
    for i in range(min(MOST, len(samples))):
        try:
            picture = samples[i].image.convert("RGB")
        except (BadSample, OSError):
            continue
        test.append(samples[i].captions[0])
        pictures.append(picture)
    return Captions(train, test, pictures, split)


def gender_of(caption: str) -> str:
    """`male`, `female` or `neither` (a person without gender); "" for captions with none or several of these."""
    in_caption = set(words(caption))
    genders = [name for name, group in GENDERS.items() if in_caption & group]
    return genders[0] if len(genders) == 1 else ""


def _objects(caption: str) -> str:
    """The role of a person, without tone and gender: "pilot"; "" for captions without a skin tone."""
    parts = split_tone(caption)
    if parts is None:
        return ""
    return " ".join(word for word in words(parts[0] + parts[2]) if word not in _GENDERED) or "only a person"


def _frequent(train: Sequence[str]) -> Callable[[str], str]:
    """A function that returns the only frequent word of a caption, or "" if the caption has none or several."""
    counts = Counter(word for text in train for word in set(words(text)) if word not in _STOP_WORDS)
    frequent = {word for word, count in counts.most_common(20) if count < 0.5 * len(train)}

    def only(caption: str) -> str:
        in_caption = frequent & set(words(caption))
        return in_caption.pop() if len(in_caption) == 1 else ""

    return only


def run_probe(
    name: str, train: Sequence[str], test: Sequence[str], texts: Sequence[str], spaces: Mapping[str, tuple[Tensor, ...]]
) -> Probe | None:
    """Probes one property; returns None if the property has fewer than two classes, or too few captions.

    `train` and `test` are the classes of the training captions and of the held-out captions ("" leaves a caption out).
    `texts` are the held-out captions. `spaces` maps each embedding and baseline to the vectors of the training captions
    and of the held-out captions.
    """
    counts = Counter(label for label in train if label)
    classes = sorted(label for label, count in counts.items() if count >= 2)
    if len(classes) > MANY:
        classes = [label for label in classes if label in set(test)]
    index = {label: i for i, label in enumerate(classes)}
    learn, ask = (torch.tensor([i for i in range(len(side)) if side[i] in index]).long() for side in (train, test))
    learn = learn[:: -(-len(learn) // LEARNED) or 1]
    if len(classes) < 2 or len(learn) < 20 or len(ask) < 8:
        return None
    targets, truth = (torch.tensor([index[side[i]] for i in rows]) for side, rows in ((train, learn), (test, ask)))
    weights = metrics.bootstrap_weights([group_of(texts[i]) for i in ask])
    accuracy, shares = {}, {}
    for space, (vectors, held_out) in spaces.items():
        right = (probes.probe(vectors[learn], targets, held_out[ask], len(classes)) == truth).double()
        low, high = metrics.interval(metrics.weighted_mean(right, weights))
        accuracy[space] = (right.mean().item(), low, high)
        share = probes.explained(held_out[ask], truth)
        shares[space] = None if math.isnan(share) else share
    chance = truth.eq(index[max(classes, key=counts.__getitem__)]).double().mean().item()
    return Probe(name, tuple(classes), len(learn), len(ask), chance, accuracy, shares)


@torch.no_grad()
def _untrained(model: TextToImage, texts: Sequence[str]) -> Tensor:
    encoder = fresh_text_encoder(model.files, seed=0)
    limit = model.config.data.max_tokens
    batches = [model.tokenizer.encode(texts[i : i + 64], limit) for i in range(0, len(texts), 64)]
    return torch.cat([encoder(*batch).sentence for batch in batches])


def neighbours(model: TextToImage, which: str, captions: Captions, queries: Sequence[str]) -> dict[str, list[str]]:
    """Query -> the nearest of the 600 most frequent words of training captions. Each word is embedded separately."""
    frequency = Counter(word for text in captions.train for word in set(words(text)))
    texts = [word for word, count in frequency.most_common(600) if count >= 2 and len(word) > 1]
    if model.files.frozen is not None and model.files.frozen.about.get("kind") == "table":
        texts = captions.test[:600]  # a table of captions has no vectors of single words
    if len(texts) < 2:
        return {}
    queries = [query for query in queries if query in texts]
    queries = queries or _spread([text for text in texts if text not in _STOP_WORDS])
    nearest = probes.nearest(model.embed_text(texts, which), count=6)
    return {query: [texts[i] for i in nearest[texts.index(query)]] for query in queries}


def _spread(texts: list[str]) -> list[str]:
    """The 7 most frequent texts, and 7 evenly spaced texts of the ranks 8 to 200."""
    rest = texts[7:200]
    return texts if len(texts) <= 14 else texts[:7] + [rest[i * len(rest) // 7] for i in range(7)]
