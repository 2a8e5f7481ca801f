"""Edits of held-out pictures: is it what was asked, and did the rest stay?

A set of drawings that differ by what their names say holds the true answer to many edits: the same role in another
skin tone, the same picture as a woman instead of a man. Each edit is compared with that true target, pixel by pixel and
in the features of a network that had no part in training, beside the two trivial answers: *copy* the source, and draw
from *scratch* with the text-to-image model that editing began with. An edit that is worth anything beats both.

Targets are held out, always. The sources of tone changes are, too; those of gender changes may be training pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dist_t2i.data.images import decode, square
from dist_t2i.data.stream.batch import caption_id
from dist_t2i.data.stream.edit_pairs import read_captions
from dist_t2i.errors import UserError
from dist_t2i.eval import metrics
from dist_t2i.eval.evaluate import manifest
from dist_t2i.eval.judges.features import FeatureNetwork, load_features
from dist_t2i.eval.scores import Score, Scores, SplitScores
from dist_t2i.eval.skin_tones import TONES as SKIN_TONES
from dist_t2i.eval.skin_tones import group_of, split_tone, tone_pair
from dist_t2i.reporting.image_grid import GridRow, draw_grid
from dist_t2i.utils.seeds import mix

if TYPE_CHECKING:
    from PIL.Image import Image

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

Say = Callable[[str], None]
TONES, GENDERS, OWN = "tone changes", "gender changes", "nothing to change"
"""Names of the parts of the table."""
ANSWERS = {"copy": "the source copied", "scratch": "drawn from scratch"}
ALIKE = 8
"""Pixels whose colours differ by at most so many levels (of 255) count as the same."""
SKIN = 24
"""Pixels that differ by more between the real tones of a role are those that show its tone."""


@dataclass(frozen=True)
class EditProtocol:
    """The rules; see `protocol.Protocol` for those that both have."""

    name: str = "edits"
    version: int = 1
    splits: tuple[str, ...] = ()
    """Where the targets come from; empty: `test-combinations` if there is one, else every split named test..."""
    features: str = "efficientnet-lite0"
    seed: int = 0
    """One edit a case, and one picture from scratch."""
    strength: float = 1.0
    gallery: int = 100
    resamples: int = 1_000


class Case(NamedTuple):
    """One edit: the caption of its source, its text (the caption of the true target), and what it is drawn with in a
    bootstrap."""

    source: str
    text: str
    group: str


@dataclass(frozen=True)
class Answers:
    """The cases of one kind with all answers to them, uint8 [N, 3, H, W] each."""

    cases: Sequence[Case]
    edit: Tensor
    copy: Tensor
    scratch: Tensor
    target: Tensor
    judge: Remembered

    def features(self, name: str) -> Tensor:
        """The judge's features of an answer, or of `target`: [N, D]."""
        return self.judge(getattr(self, name))

    def pixels(self, name: str) -> Tensor:
        """How far an answer is from the true target, float64 [N] in levels of 255."""
        return (getattr(self, name).double() - self.target.double()).abs().mean(dim=(1, 2, 3))

    def distances(self, name: str) -> Mapping[str, Tensor]:
        """How far an answer is from the true target: in pixels, and 1 - cosine of features, float64 [N] each."""
        answer, target = metrics.unit(self.features(name)), metrics.unit(self.features("target"))
        return {"pixels": self.pixels(name), "features": 1 - (answer * target).sum(1)}


def evaluate_edits(
    model: TextToImage,
    base: TextToImage,
    data: ShardSet,
    protocol: EditProtocol = EditProtocol(),
    *,
    say: Say = print,
    judge: FeatureNetwork | None = None,
) -> tuple[Scores, Image]:
    """Scores of a model that edits, by kind of edit, and a grid of some edits; `base` draws from scratch.

    Raises UserError when the set has too few pictures that are true targets of one another, or the two models are of
    different sizes. Takes about 0.2 s an edit on one core at 32 px, nearly all of it in the judge.
    """
    if base.image_size != model.image_size:
        raise UserError(f"{base.files.folder} draws at {base.image_size} px, but the edits have {model.image_size} px")
    library = Library(data, protocol, model.image_size)
    judge = judge or load_features(protocol.features, model.device)
    remembered = Remembered(judge)
    parts, rows = {}, []
    for kind, find, score in KINDS:
        cases = find(library)
        if kind == TONES and len(cases) < 2:
            raise UserError(
                f"{data.folder}: no two held-out pictures that differ by the skin tone of their names alone"
            )
        if len(cases) < 2:
            continue
        say(f"{kind}: {len(cases)} edits")
        found = answer(cases, model, base, library, protocol, remembered)
        parts[kind] = SplitScores(len(cases), tuple(score(found, library, protocol, judge.name)))
        rows += grid_rows(found, 6) if kind != OWN else []
    about = manifest(model, data, protocol, {protocol.features: judge}) | {"base_weights_sha256": base.files.sha256()}
    title = "source, edit, true target, drawn from scratch; names: of the target, was that of the source"
    return Scores(dataclasses.asdict(protocol), about, parts), draw_grid(rows, title=title, tile=64, columns=2)


# ---- cases -----------------------------------------------------------------------------------------------------------


class Library:
    """First captions of a set, and the pictures that go with them, decoded when they are asked for."""

    def __init__(self, data: ShardSet, protocol: EditProtocol, size: int) -> None:
        preferred = ("test-combinations",) if "test-combinations" in data.splits else ()
        splits = protocol.splits or preferred or tuple(name for name in data.splits if name.startswith("test"))
        self._data, self._size = data, size
        self._place: dict[str, tuple[str, int]] = {}
        self._decoded: dict[str, Tensor] = {}
        self.held_out: list[str] = []
        """Captions of possible targets, in the order of the set."""
        for split in sorted(data.splits):
            for number, captions in enumerate(read_captions(data.shards(split))):
                if captions and captions[0] not in self._place:
                    self._place[captions[0]] = split, number
                    self.held_out += [captions[0]] if split in splits else []

    def __contains__(self, caption: str) -> bool:
        return caption in self._place

    def pictures(self, captions: Sequence[str]) -> Tensor:
        """uint8 [N, 3, H, W]."""
        for caption in captions:
            if caption not in self._decoded:
                split, number = self._place[caption]
                pixels = decode(self._data.samples(split)[number].image_bytes, self._size)
                self._decoded[caption] = square(pixels, self._size)
        return torch.stack([self._decoded[caption] for caption in captions])


class Remembered:
    """A judge that looks at each picture once: most are a source here and a target there."""

    def __init__(self, judge: FeatureNetwork) -> None:
        self._judge = judge
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> features [N, D]."""
        names = [picture.contiguous().numpy().tobytes() for picture in pictures]
        fresh = {name: i for i, name in enumerate(names) if name not in self._known}
        if fresh:
            self._known.update(zip(fresh, self._judge(pictures[list(fresh.values())]), strict=True))
        return torch.stack([self._known[name] for name in names])


def tone_cases(library: Library) -> list[Case]:
    """Light to dark and dark to light, between held-out pictures."""
    held_out = set(library.held_out)
    cases = []
    for text in library.held_out:
        pair = tone_pair(text)
        if pair and held_out.issuperset(pair) and text in pair:
            cases.append(Case(pair[0] if text == pair[1] else pair[1], text, pair[0]))
    return cases


_SWAPPED = {"man": "woman", "woman": "man", "men": "women", "women": "men", "boy": "girl", "girl": "boy"}


def gender_cases(library: Library) -> list[Case]:
    """The one word for a man or a woman in a held-out name exchanged; the source may be a training picture."""
    cases = []
    for text in library.held_out:
        said = text.split()
        places = [i for i, word in enumerate(said) if word in _SWAPPED]
        if len(places) == 1:
            said[places[0]] = _SWAPPED[said[places[0]]]
            source = " ".join(said)
            cases += [Case(source, text, group_of(min(text, source)))] if source in library else []
    return cases


def own_cases(library: Library) -> list[Case]:
    """Every held-out picture with its own caption."""
    return [Case(text, text, group_of(text)) for text in library.held_out]


def answer(
    cases: Sequence[Case],
    model: TextToImage,
    base: TextToImage,
    library: Library,
    protocol: EditProtocol,
    judge: Remembered,
) -> Answers:
    """All answers to the cases. An edit and its rival from scratch have the same noise."""
    texts = [case.text for case in cases]
    seeds = [mix(protocol.seed, caption_id(case.group), 4) for case in cases]
    copy, target = library.pictures([case.source for case in cases]), library.pictures(texts)
    edit = model.sample_edits(copy, texts, seeds, protocol.strength)
    pictures = {"edit": edit, "copy": copy, "scratch": base.sample(texts, seeds), "target": target}
    return Answers(cases, **pictures, judge=judge)


# ---- scores ----------------------------------------------------------------------------------------------------------


def target_scores(found: Answers, library: Library, protocol: EditProtocol, judge: str) -> list[Score]:
    """How near the edits are to their true targets, and by how much nearer than the trivial answers."""
    weights = _weights(found, protocol)
    distances = {name: found.distances(name) for name in ("edit", *ANSWERS)}
    units = {"pixels": "levels of 255", "features": f"1 - cosine, {judge}"}
    scores = []
    for what, unit in units.items():
        mine = distances["edit"][what]
        trivial = {text: distances[name][what].mean().item() for name, text in ANSWERS.items()}
        scores.append(_score(what, f"{what}: distance to target ({unit})", mine, weights, "lower", trivial))
        for name, text in ANSWERS.items():
            gain = distances[name][what] - mine
            label = f"{what}: nearer than {text} by"
            scores.append(_score(f"{what}_gain_{name}", label, gain, weights, "higher", {"no gain": 0.0}))
    scores.append(_outside(found, weights))
    hits = {name: _found_first(found, name, protocol) for name in ("edit", *ANSWERS)}
    shown = min(protocol.gallery, len(found.cases))
    floor = {text: hits[name].mean().item() for name, text in ANSWERS.items()}
    scores.append(_score("recall_at_1", f"R@1 of {shown} ({judge})", hits["edit"], weights, "higher", floor))
    return scores


def _found_first(found: Answers, name: str, protocol: EditProtocol) -> Tensor:
    """How probably the true target is the nearest of a gallery of targets, which holds the sources too: [N]."""
    ranks = metrics.retrieval_ranks(found.features(name), found.features("target"))
    return metrics.recall_at(1, ranks, len(found.cases), protocol.gallery)


def _outside(found: Answers, weights: Tensor) -> Score:
    """What an edit changed where nothing was to change: the pixels at which source and target agree."""
    same = ((found.copy.int() - found.target.int()).abs().amax(1) <= ALIKE).double()

    def change(pictures: Tensor) -> Tensor:
        moved = (pictures.double() - found.target.double()).abs().mean(1)
        return (moved * same).sum(dim=(1, 2)) / same.sum(dim=(1, 2)).clamp_min(1)

    floor = {ANSWERS["scratch"]: change(found.scratch).mean().item()}
    name = "pixels that should stay: change (levels of 255)"
    return _score("outside", name, change(found.edit), weights, "lower", floor)


def tone_scores(found: Answers, library: Library, protocol: EditProtocol, judge: str) -> list[Score]:
    """How often the tone is right, judged by the real pictures of the same role in all its tones; then the other scores."""
    weights = _weights(found, protocol)
    right = {name: right_tone(getattr(found, name), found.cases, library) for name in ("edit", *ANSWERS)}
    floor = {text: right[name].mean().item() for name, text in ANSWERS.items()}
    label = f"right tone ({int(right['edit'].sum())} of {len(found.cases)}), nearest of the real tones"
    scores = [_score("right_tone", label, right["edit"], weights, "higher", floor, {"the true target": 1.0})]
    row = {case.text: i for i, case in enumerate(found.cases)}
    tones = [tone_pair(case.text) for case in found.cases]
    pairs = torch.tensor([[row[light], row[dark]] for light, dark in tones])
    order = {
        name: metrics.tone_order(getattr(found, name)[pairs[:, 0]], getattr(found, name)[pairs[:, 1]])
        for name in ("edit", *ANSWERS)
    }
    floor = {text: order[name].mean().item() for name, text in ANSWERS.items()}
    scores.append(_score("tone_order", "to light brighter than to dark", order["edit"], weights, "higher", floor))
    return scores + target_scores(found, library, protocol, judge)


def right_tone(pictures: Tensor, cases: Sequence[Case], library: Library) -> Tensor:
    """1 where picture i, at the pixels that show the tone of its role, is nearest to the real picture of the tone that
    case i asks for, of all real tones of the role in the set; float64 [N].

    The difference of two squared distances is linear in the picture, so noise over the pixels averages out: it is their
    mean shade between the real ones that decides.
    """
    found = []
    for picture, case in zip(pictures.double(), cases, strict=True):
        before, asked, after = split_tone(case.text)
        tones = [tone for tone in SKIN_TONES if f"{before}{tone} skin tone{after}" in library]
        real = library.pictures([f"{before}{tone} skin tone{after}" for tone in tones]).double()
        skin = ((real.amax(0) - real.amin(0)).amax(0) > SKIN).double()
        nearest = ((real - picture).square() * skin).sum(dim=(1, 2, 3)).argmin()
        found.append(float(tones[int(nearest)] == asked))
    return torch.tensor(found, dtype=torch.double)


def own_scores(found: Answers, library: Library, protocol: EditProtocol, judge: str) -> list[Score]:
    """How far a picture is from itself when its own caption is asked for."""
    floor = {ANSWERS["scratch"]: found.pixels("scratch").mean().item()}
    name = "pixels: change (levels of 255)"
    return [_score("pixels", name, found.pixels("edit"), _weights(found, protocol), "lower", floor)]


KINDS = ((TONES, tone_cases, tone_scores), (GENDERS, gender_cases, target_scores), (OWN, own_cases, own_scores))
"""What is edited: the name of the kind, its cases, their scores."""


def _weights(found: Answers, protocol: EditProtocol) -> Tensor:
    return metrics.bootstrap_weights([case.group for case in found.cases], protocol.resamples)


def _score(
    key: str,
    name: str,
    values: Tensor,
    weights: Tensor,
    better: str,
    floor: Mapping[str, float],
    ceiling: Mapping[str, float] | None = None,
) -> Score:
    low, high = metrics.interval(metrics.weighted_mean(values, weights))
    return Score(key, name, values.double().mean().item(), low, high, better, floor, ceiling or {})


def verdict(scores: Scores) -> str:
    """What the intervals allow to say of the tone changes: right in how many, and nearer than which trivial answer."""
    right = scores[TONES, "right_tone"]
    lines = [f"tone changes: the right tone in {right.value:.1%} of {scores.splits[TONES].pictures}"]
    for kind in scores.splits:
        for what in ("pixels", "features"):
            for name, text in ANSWERS.items() if kind != OWN else ():
                gain = scores[kind, f"{what}_gain_{name}"]
                said = "nearer than" if gain.low > 0 else "farther than" if gain.high < 0 else "not told apart from"
                lines.append(f"{kind}, {what}: {said} {text}")
    return "\n".join(lines)


def grid_rows(found: Answers, count: int) -> list[GridRow]:
    """Rows of source, edit, true target and scratch for some of the cases, spread evenly over them."""
    count = min(count, len(found.cases))
    rows = []
    for i in (len(found.cases) * (2 * k + 1) // (2 * count) for k in range(count)):
        shown = [p[i].permute(1, 2, 0).numpy() for p in (found.copy, found.edit, found.target, found.scratch)]
        rows.append(GridRow(f"{found.cases[i].text} (was: {found.cases[i].source})", shown))
    return rows
