"""A page with plots of what the text embeddings have learned: DIR/index.html, embeddings.json, map.png, probes.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.eval.skin_tones import TONES
from dist_t2i.reporting import web_page
from dist_t2i.reporting.figures import new_figure, save_figure
from dist_t2i.utils.files import write_atomic

if TYPE_CHECKING:
    from dist_t2i.eval.studies.embeddings import Probe, Study

_COLORS = dict(zip(TONES, ("#f2c9a1", "#d9a066", "#a86b3c", "#70421f", "#3b2110"), strict=True))
"""Colors of the five skin tones; the classes of other properties have matplotlib's default colors."""
_THUMBNAILS = 150


def write(study: Study, out: Path, title: str, credit: str) -> Path:
    """Write the page and its files into `out`; returns the page's path. Raises ImportError without matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "embeddings.json", json.dumps(study.as_json(), indent=1) + "\n")
    plot_map(study, out / "map.png")
    body = [f"<h1>{escape(title)}</h1>"]
    if study.alike is not None:
        body.append(
            "<p>On the same captions, the similarity of S_G (the generator's embedding) and S_D (the discriminator's) "
            f"is {study.alike:.2f} (linear CKA; 1: equal up to rotation and scale, 0: nothing in common).</p>"
        )
    if study.probes:
        plot_probes(study.probes, out / "probes.png")
        heads, rows = probe_rows(study)
        body += [
            "<h2>What the embeddings contain</h2>" + web_page.file(out / "probes.png", "accuracy of linear probes"),
            web_page.table(heads, rows, _PROBE_CAPTION),
            f"<p class=note>{escape(_PROBE_NOTE.format(split=study.captions.split))}</p>",
        ]
    body.append("<h2>Map of the captions</h2>" + web_page.file(out / "map.png", "principal components"))
    body.append(f"<p class=note>{_MAP_NOTE}</p>")
    for name, nearest in study.neighbours.items():
        rows = [[query, ", ".join(texts)] for query, texts in nearest.items()]
        table = web_page.table(["text", "nearest other texts, nearest first"], rows)
        body.append(f"<h2>Nearest in {escape(name)}</h2>{table}")
    body.append(f"<p class=note>{escape(credit)}</p>" if credit else "")
    return web_page.write(out / "index.html", title, body)


_MAP_NOTE = (
    "The map shows the first two principal components of the held-out captions for each embedding; their shares of "
    "the variance are in brackets. Captions that are far apart on the map are far apart in the embedding. Captions "
    "that are close on the map may differ in the other components."
)
_PROBE_CAPTION = "Held-out accuracy of linear probes (95% interval), and the share of variance between the classes"
_PROBE_NOTE = (
    "A probe is a logistic regression on sentence vectors, trained on training captions and scored on {split}. The 95% "
    "bootstrap intervals are over held-out captions; captions that differ only in skin tone are resampled together. "
    "Chance is the score of always answering the most frequent class. The captions name the property, so compare each "
    "score with the bag of words (all information) and with an untrained encoder (what the architecture keeps). The "
    "share of variance shows how strongly the embedding depends on the property (omega squared; 0: not at all)."
)


def probe_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """The column heads and the rows of the table of probes."""
    names = list(study.probes[0].accuracy)
    rows = []
    for probe in study.probes:
        counts = [str(len(probe.classes)), f"{probe.train:,} / {probe.test:,}", f"{probe.chance:.3f}"]
        cells = (_cell(*probe.accuracy[name], probe.variance_share[name]) for name in names)
        rows.append([probe.name, *counts, *cells])
    return ["property", "classes", "captions trained / scored on", "chance", *names], rows


def _cell(value: float, low: float, high: float, share: float | None) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})" + ("" if share is None else f"; {share:.1%} of variance")


def plot_probes(probes: Sequence[Probe], path: Path) -> None:
    """Plot the accuracies as bars with their intervals, and chance as a line."""
    figure = new_figure(3.4 * len(probes), 3.0)
    for axes, probe in zip(figure.subplots(1, len(probes), squeeze=False)[0], probes, strict=True):
        for position, (name, (value, low, high)) in enumerate(probe.accuracy.items()):
            baseline = name in ("bag of words", "untrained encoder")
            axes.bar(position, value, color="lightgrey" if baseline else "tab:blue", width=0.7)
            axes.plot([position, position], [low, high], color="black", linewidth=1.2)
        axes.axhline(probe.chance, color="tab:red", linestyle="--", linewidth=1, label="chance")
        axes.set_xticks(range(len(probe.accuracy)), [name.replace(" ", "\n") for name in probe.accuracy], fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{probe.name} ({len(probe.classes)} classes)", fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
        axes.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def plot_map(study: Study, path: Path) -> None:
    """Plot one row per embedding: the captions as dots colored by class, and as their pictures."""
    properties = [name for name, labels in study.labels.items() if 2 <= len(set(labels) - {""}) <= 8]
    columns = max(1, len(properties)) + bool(study.captions.pictures)
    figure = new_figure(4.2 * columns, 4.0 * len(study.maps))
    grid = figure.subplots(len(study.maps), columns, squeeze=False)
    for row, (name, (points, shares)) in zip(grid, study.maps.items(), strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name} ({shares[0]:.0%} + {shares[1]:.0%})", fontsize=10)
        for axes, heading in zip(row, properties or [""], strict=False):
            _dots(axes, points, study.labels.get(heading, [""] * len(points)), heading)
        if study.captions.pictures:
            _thumbnails(row[-1], points, study.captions.pictures)
    save_figure(figure, path)


def _dots(axes: Any, points: Any, labels: Sequence[str], heading: str) -> None:
    classes = sorted(set(labels) - {""}, key=lambda name: (TONES.index(name) if name in TONES else 99, name))
    unlabeled = [i for i, label in enumerate(labels) if not label]
    axes.scatter(points[unlabeled, 0], points[unlabeled, 1], s=6, color="lightgrey")
    for number, name in enumerate(classes):
        dots = points[[i for i, label in enumerate(labels) if label == name]]
        color = _COLORS.get(name, f"C{number}")
        axes.scatter(dots[:, 0], dots[:, 1], s=14, color=color, edgecolors="black", linewidths=0.3, label=name)
    axes.set_title(heading, fontsize=10)
    if classes:
        axes.legend(fontsize=8)


def _thumbnails(axes: Any, points: Any, pictures: Sequence[Any]) -> None:
    import numpy
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    step = max(1, len(pictures) // _THUMBNAILS)
    for i in range(0, len(pictures), step):
        small = OffsetImage(numpy.asarray(pictures[i].resize((20, 20))), zoom=0.9)
        axes.add_artist(AnnotationBbox(small, points[i].tolist(), frameon=False, pad=0))
    low, high = points.amin(0) * 1.08, points.amax(0) * 1.08
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.set_title("their pictures", fontsize=10)
