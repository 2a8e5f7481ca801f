"""Scores edits of held-out pictures: does the edit match its text, and does the rest stay the same?

In a set of pictures with systematic names, many edits have a true target, such as the same role in another skin tone.
Edits are compared with their targets in pixels and in the features of an independent network. Two trivial answers are
compared in the same way: a *copy* of the source, and a picture generated from *scratch*. The text-to-image model from
which training for edits started generates this picture. Targets and the sources of tone changes are held out. Sources
of gender changes may be training pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor

from dist_t2i.data.images import decode, square
from dist_t2i.data.stream.batch import caption_id
from dist_t2i.data.stream.edit_pairs import read_captions
from dist_t2i.errors import UserError
from dist_t2i.eval import metrics, skin_tones
from dist_t2i.eval.evaluate import manifest
from dist_t2i.eval.judges.features import FeatureNetwork, load_features
from dist_t2i.eval.scores import Score, Scores, SplitScores
from dist_t2i.utils.seeds import Purpose, mix

if TYPE_CHECKING:
    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

TONES, GENDERS, OWN = "tone changes", "gender changes", "nothing to change"
TRIVIAL = {"copy": "the source copied", "scratch": "generated from scratch"}
"""Trivial answer -> its description."""
ALIKE = 8
"""Pixels are equal if their colors differ by at most this many levels (of 255)."""
SKIN = 24
"""Pixels are skin if the real pictures of a role in different tones differ there by more than this many levels."""


@dataclass(frozen=True)
class EditProtocol:
    """The rules. A field that `protocol.Protocol` also has means the same there."""

    name: str = "edits"
    version: int = 1
    splits: tuple[str, ...] = ()
    """Splits with the targets. Empty: `test-combinations` if the set has it, else all splits named `test...`."""
    features: str = "efficientnet-lite0"
    seed: int = 0
    """Seed of the noise; each case has one edit and one picture from scratch."""
    strength: float = 1.0
    gallery: int = 100
    resamples: int = 1_000


class Case(NamedTuple):
    """One edit: the captions of its source and of its true target (`text`). A group is resampled as a whole."""

    source: str
    text: str
    group: str


@dataclass(frozen=True)
class Answers:
    """The cases of one kind of edit, with the answers of the model and the trivial answers."""

    cases: Sequence[Case]
    pictures: Mapping[str, Tensor]
    """`edit`, `copy`, `scratch`, and `target` -> uint8 [N, 3, H, W]"""
    network: str
    features: Callable[[Tensor], Tensor]
    protocol: EditProtocol

    def each(self, function: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Name of an answer -> the result of `function` for this name."""
        return {name: function(name) for name in ("edit", *TRIVIAL)}

    def pixel_distance(self, name: str) -> Tensor:
        """Distance of an answer from the true target, float64 [N] in levels of 255."""
        return (self.pictures[name].double() - self.pictures["target"].double()).abs().mean(dim=(1, 2, 3))

    def feature_distance(self, name: str) -> Tensor:
        """1 - cosine of the features of an answer and of the true target, float64 [N]."""
        answer, target = (metrics.unit(self.features(self.pictures[which])) for which in (name, "target"))
        return 1 - (answer * target).sum(1)

    def target_first(self, name: str) -> Tensor:
        """Probability that, in a random gallery of targets, the true target is the nearest: float64 [N]."""
        ranks = metrics.retrieval_ranks(self.features(self.pictures[name]), self.features(self.pictures["target"]))
        return metrics.recall_at(1, ranks, len(self.cases), self.protocol.gallery)

    def score(self, key: str, name: str, values: Mapping[str, Tensor], better: str) -> Score:
        """The mean of the edits' values [N] with its interval; the trivial answers among `values` are the floor."""
        weights = metrics.bootstrap_weights([case.group for case in self.cases], self.protocol.resamples)
        low, high = metrics.interval(metrics.weighted_mean(values["edit"], weights))
        means = {name: value.double().mean().item() for name, value in values.items()}
        floor = {text: means[name] for name, text in TRIVIAL.items() if name in means}
        return Score(key, name, means["edit"], low, high, better, floor)


def evaluate_edits(
    model: TextToImage,
    base: TextToImage,
    data: ShardSet,
    protocol: EditProtocol = EditProtocol(),
    *,
    say: Callable[[str], None] = print,
    network: FeatureNetwork | None = None,
) -> tuple[Scores, list[tuple[str, list[numpy.ndarray]]]]:
    """Scores a model's edits by kind of edit; returns the scores and some example edits.

    `base` generates the pictures from scratch. An example is the captions of target and source, and four pictures uint8
    [H, W, 3]: the source, the edit, the target, and the picture from scratch. Raises UserError when the set has too few
    true targets, or when the two models have different image sizes. On one core at 32 px, an evaluation takes about
    0.2 s per edit; the feature network takes nearly all of this time.
    """
    sizes = base.image_size, model.image_size
    if sizes[0] != sizes[1]:
        raise UserError(f"{base.files.folder} generates pictures of {sizes[0]} px, but the edits have {sizes[1]} px")
    library = Library(data, protocol, model.image_size)
    network = network or load_features(protocol.features, model.device)
    features, parts, examples = cached(network), {}, []
    for kind, find, score in KINDS:
        cases = find(library)
        if kind == TONES and len(cases) < 2:
            raise UserError(f"{data.folder} has no two held-out pictures whose names differ only in skin tone")
        if len(cases) < 2:
            continue
        say(f"{kind}: {len(cases)} edits")
        texts = [case.text for case in cases]
        seeds = [mix(protocol.seed, caption_id(case.group), Purpose.EVALUATION_NOISE) for case in cases]
        sources = library.pictures([case.source for case in cases])
        edits, scratch = model.sample_edits(sources, texts, seeds, protocol.strength), base.sample(texts, seeds)
        pictures = {"edit": edits, "copy": sources, "scratch": scratch, "target": library.pictures(texts)}
        answers = Answers(cases, pictures, network.name, features, protocol)
        parts[kind] = SplitScores(len(cases), tuple(score(answers, library)))
        examples += examples_of(answers) if kind != OWN else []
    about = manifest(model, data, protocol, {protocol.features: network}) | {"base_weights_sha256": base.files.sha256()}
    return Scores(dataclasses.asdict(protocol), about, parts), examples


def cached(network: FeatureNetwork) -> Callable[[Tensor], Tensor]:
    """Wraps a feature network: it computes each picture only once, because most pictures are source and target."""
    known: dict[bytes, Tensor] = {}

    def features(pictures: Tensor) -> Tensor:
        keys = [picture.contiguous().numpy().tobytes() for picture in pictures]
        if new := {key: i for i, key in enumerate(keys) if key not in known}:
            known.update(zip(new, network(pictures[list(new.values())]), strict=True))
        return torch.stack([known[key] for key in keys])

    return features


def examples_of(answers: Answers) -> list[tuple[str, list[numpy.ndarray]]]:
    """Captions (the target's, then the source's) and pictures of up to 6 cases, evenly spaced."""
    total, count = len(answers.cases), min(6, len(answers.cases))
    captions = [f"{case.text} ({case.source})" for case in answers.cases]
    pictures = [answers.pictures[name].permute(0, 2, 3, 1).numpy() for name in ("copy", "edit", "target", "scratch")]
    spaced = [total * (2 * k + 1) // (2 * count) for k in range(count)]
    return [(captions[i], [images[i] for images in pictures]) for i in spaced]


class Library:
    """Maps the first caption of each picture to the picture. `held_out` lists the captions of possible targets."""

    def __init__(self, data: ShardSet, protocol: EditProtocol, size: int) -> None:
        preferred = ("test-combinations",) if "test-combinations" in data.splits else ()
        splits = protocol.splits or preferred or tuple(name for name in data.splits if name.startswith("test"))
        self._data, self._size = data, size
        self._position: dict[str, tuple[str, int]] = {}
        self._decoded: dict[str, Tensor] = {}
        self.held_out: list[str] = []
        for split in sorted(data.splits):
            for number, captions in enumerate(read_captions(data.shards(split))):
                if captions and captions[0] not in self._position:
                    self._position[captions[0]] = split, number
                    self.held_out += [captions[0]] if split in splits else []

    def __contains__(self, caption: str) -> bool:
        return caption in self._position

    def pictures(self, captions: Sequence[str]) -> Tensor:
        """The pictures of these captions, uint8 [N, 3, H, W]."""
        for caption in captions:
            if caption not in self._decoded:
                split, number = self._position[caption]
                pixels = decode(self._data.samples(split)[number].image_bytes, self._size)
                self._decoded[caption] = square(pixels, self._size)
        return torch.stack([self._decoded[caption] for caption in captions])


def tone_cases(library: Library) -> list[Case]:
    """Edits from light to dark and from dark to light skin tone, between held-out pictures."""
    held_out = set(library.held_out)
    pairs = [(text, pair) for text in library.held_out if (pair := skin_tones.tone_pair(text))]
    return [
        Case(pair[0] if text == pair[1] else pair[1], text, pair[0])
        for text, pair in pairs
        if text in pair and held_out.issuperset(pair)
    ]


_SWAPPED = {"man": "woman", "woman": "man", "men": "women", "women": "men", "boy": "girl", "girl": "boy"}


def gender_cases(library: Library) -> list[Case]:
    """Edits to held-out pictures whose captions have exactly one gendered word; the source has the opposite word."""
    cases = []
    for text in library.held_out:
        words = text.split()
        source = " ".join(_SWAPPED.get(word, word) for word in words)
        if sum(word in _SWAPPED for word in words) == 1 and source in library:
            cases.append(Case(source, text, skin_tones.group_of(min(text, source))))
    return cases


def own_cases(library: Library) -> list[Case]:
    """Edits of every held-out picture with its own caption."""
    return [Case(text, text, skin_tones.group_of(text)) for text in library.held_out]


def target_scores(answers: Answers, library: Library) -> list[Score]:
    """Distance of the edits from their true targets, and how much nearer to the targets they are than the trivial
    answers."""
    scores = []
    for key, distance, unit in (
        ("pixels", answers.pixel_distance, "levels of 255"),
        ("features", answers.feature_distance, f"1 - cosine, {answers.network}"),
    ):
        distances = answers.each(distance)
        scores.append(answers.score(key, f"{key}: distance to target ({unit})", distances, "lower"))
        for name, text in TRIVIAL.items():
            gain = {"edit": distances[name] - distances["edit"]}
            label = f"{key}: nearer than {text} by"
            score = answers.score(f"{key}_gain_{name}", label, gain, "higher")
            scores.append(dataclasses.replace(score, floor={"no gain": 0.0}))
    label = f"R@1 of {min(answers.protocol.gallery, len(answers.cases))} ({answers.network})"
    recall = answers.score("recall_at_1", label, answers.each(answers.target_first), "higher")
    return [*scores, _outside(answers), recall]


def _outside(answers: Answers) -> Score:
    """How much the edits change pixels that should not change: those that are equal in source and target."""
    target = answers.pictures["target"]
    same = ((answers.pictures["copy"].int() - target.int()).abs().amax(1) <= ALIKE).double()

    def change(name: str) -> Tensor:
        moved = (answers.pictures[name].double() - target.double()).abs().mean(1)
        return (moved * same).sum(dim=(1, 2)) / same.sum(dim=(1, 2)).clamp_min(1)

    changes = {name: change(name) for name in ("edit", "scratch")}
    return answers.score("outside", "pixels that should stay: change (levels of 255)", changes, "lower")


def tone_scores(answers: Answers, library: Library) -> list[Score]:
    """How often the tone is right: among the role's real pictures, the one nearest to the edit has the requested tone.
    Then `target_scores`."""
    right = answers.each(lambda name: right_tone(answers.pictures[name], answers.cases, library))
    row = {case.text: i for i, case in enumerate(answers.cases)}
    pairs = [skin_tones.tone_pair(case.text) for case in answers.cases]
    light, dark = torch.tensor([[row[caption] for caption in pair] for pair in pairs if pair]).T
    order = answers.each(lambda name: metrics.tone_order(answers.pictures[name][light], answers.pictures[name][dark]))
    label = f"right tone ({int(right['edit'].sum())} of {len(answers.cases)}), nearest of the real tones"
    return [
        dataclasses.replace(answers.score("right_tone", label, right, "higher"), ceiling={"the true target": 1.0}),
        answers.score("tone_order", "to light brighter than to dark", order, "higher"),
        *target_scores(answers, library),
    ]


def right_tone(pictures: Tensor, cases: Sequence[Case], library: Library) -> Tensor:
    """1 if the real picture of case i's role that is nearest to picture i has the requested tone, else 0: float64 [N].

    Distances use only the pixels that show skin. The difference of two squared distances is linear in the picture. So
    noise averages out, and the result depends on the mean shade of the skin.
    """
    right = []
    for picture, case in zip(pictures.double(), cases, strict=True):
        parts = skin_tones.split_tone(case.text)
        assert parts is not None, f"{case.text!r} names no single tone"
        before, asked, after = parts
        captions = {tone: f"{before}{tone} skin tone{after}" for tone in skin_tones.TONES}
        tones = [tone for tone, caption in captions.items() if caption in library]
        real = library.pictures([captions[tone] for tone in tones]).double()
        skin = ((real.amax(0) - real.amin(0)).amax(0) > SKIN).double()
        nearest = ((real - picture).square() * skin).sum(dim=(1, 2, 3)).argmin()
        right.append(float(tones[int(nearest)] == asked))
    return torch.tensor(right, dtype=torch.double)


def own_scores(answers: Answers, library: Library) -> list[Score]:
    """How much an edit with the picture's own caption, which requests no change, changes the picture."""
    changes = {name: answers.pixel_distance(name) for name in ("edit", "scratch")}
    return [answers.score("pixels", "pixels: change (levels of 255)", changes, "lower")]


KINDS = ((TONES, tone_cases, tone_scores), (GENDERS, gender_cases, target_scores), (OWN, own_cases, own_scores))
"""(kind of edit, function that finds its cases, function that scores them)"""


def verdict(scores: Scores) -> str:
    """What the intervals show: how many tones are right, and how the edits compare with the trivial answers."""
    right = scores[TONES, "right_tone"]
    lines = [f"tone changes: the right tone in {right.value:.1%} of {scores.splits[TONES].pictures}"]
    for kind in scores.splits:
        for what in ("pixels", "features"):
            for name, description in TRIVIAL.items() if kind != OWN else ():
                gain = scores[kind, f"{what}_gain_{name}"]
                relation = "nearer than" if gain.low > 0 else "farther than" if gain.high < 0 else "not distinct from"
                lines.append(f"{kind}, {what}: {relation} {description}")
    return "\n".join(lines)
