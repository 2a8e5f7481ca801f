"""What the embeddings have learned, as a page with pictures: DIR/index.html, embeddings.json, map.png, probes.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.reporting import web_page
from dist_t2i.utils.files import replacing, write_atomic

if TYPE_CHECKING:
    from dist_t2i.eval.studies.embeddings import Probe, Study

_COLOURS = ("#f2c9a1", "#d9a066", "#a86b3c", "#70421f", "#3b2110")
"""Of the five skin tones, lightest first; other properties take matplotlib's."""
_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_THUMBNAILS = 150


def write(study: Study, out: Path, title: str, credit: str) -> Path:
    """Everything; the page's path. Raises ImportError without matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "embeddings.json", json.dumps(study.as_json(), indent=1) + "\n")
    draw_map(study, out / "map.png")
    body = [f"<h1>{web_page.text(title)}</h1>"]
    if study.alike is not None:
        body.append(
            f"<p>S_G (read by the generator) and S_D (read by the discriminator) of the same captions are alike by "
            f"{study.alike:.2f} (linear CKA; 1: the same up to rotation and scale, 0: nothing in common).</p>"
        )
    if study.probes:
        draw_probes(study.probes, out / "probes.png")
        body.append(
            "<h2>What can be read from them</h2>" + web_page.file(out / "probes.png", "accuracy of linear probes")
        )
        body += [_probe_table(study), f"<p class=note>{web_page.text(_NOTE.format(split=study.captions.split))}</p>"]
    body.append("<h2>Where captions lie</h2>" + web_page.file(out / "map.png", "principal components"))
    body.append(
        "<p class=note>The two principal components of the held-out captions, each embedding by itself; in brackets, the "
        "share of the variance that they hold. What is apart here is apart; what is together here may still be apart in "
        "the other directions.</p>"
    )
    body += [_neighbours(name, found) for name, found in study.neighbours.items()]
    body.append(f"<p class=note>{web_page.text(credit)}</p>" if credit else "")
    return web_page.write(out / "index.html", title, body)


_NOTE = (
    "Multinomial logistic regression on sentence vectors, learned from training captions, scored on {split}; 95% bootstrap "
    "intervals over held-out captions (those that differ by skin tone alone are drawn together). Chance: always the most "
    "frequent class. The words are in the captions, so compare with the bag of words (all that is said) and with an "
    "encoder of the same kind that was never trained (what its architecture passes on by itself). The share of variance says "
    "how much of the embedding is about the property (omega squared: about 0 where it is not)."
)


def probe_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of probes."""
    names = list(study.probes[0].accuracy)
    rows = []
    for one in study.probes:
        cells = [_cell(one, name) for name in names]
        rows.append([one.name, str(len(one.classes)), f"{one.train:,} / {one.test:,}", f"{one.chance:.3f}", *cells])
    return ["property", "classes", "captions learned from / scored", "chance", *names], rows


def _cell(one: Probe, name: str) -> str:
    value, low, high = one.accuracy[name]
    share = one.share[name]
    return f"{value:.3f} ({low:.3f} to {high:.3f})" + ("" if share is None else f"; {share:.1%} of variance")


def _probe_table(study: Study) -> str:
    heads, rows = probe_rows(study)
    return web_page.table(
        heads,
        rows,
        "Held-out accuracy of linear probes (95% interval), and the share of variance that the classes make",
    )


def _neighbours(name: str, found: Any) -> str:
    rows = [[query, ", ".join(near)] for query, near in found.items()]
    return f"<h2>Nearest in {web_page.text(name)}</h2>" + web_page.table(
        ["text", "nearest others, nearest first"], rows
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_probes(probes: Sequence[Probe], path: Path) -> None:
    """Bars of accuracy with their intervals and chance as a line."""
    figure = _figure(3.4 * len(probes), 3.0)
    for axes, one in zip(figure.subplots(1, len(probes), squeeze=False)[0], probes, strict=True):
        for place, (name, (value, low, high)) in enumerate(one.accuracy.items()):
            baseline = name in ("bag of words", "untrained encoder")
            axes.bar(place, value, color="lightgrey" if baseline else "tab:blue", width=0.7)
            axes.plot([place, place], [low, high], color="black", linewidth=1.2)
        axes.axhline(one.chance, color="tab:red", linestyle="--", linewidth=1, label="chance")
        axes.set_xticks(range(len(one.accuracy)), [name.replace(" ", "\n") for name in one.accuracy], fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{one.name} ({len(one.classes)} classes)", fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
        axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def draw_map(study: Study, path: Path) -> None:
    """A row for each embedding: captions as dots by class, and as the pictures they belong to."""
    shown = [name for name, labels in study.labels.items() if 2 <= len(set(labels) - {""}) <= 8]
    columns = max(1, len(shown)) + bool(study.captions.pictures)
    figure = _figure(4.2 * columns, 4.0 * len(study.maps))
    grid = figure.subplots(len(study.maps), columns, squeeze=False)
    for row, (name, (places, shares)) in zip(grid, study.maps.items(), strict=True):
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"{name} ({shares[0]:.0%} + {shares[1]:.0%})", fontsize=10)
        for axes, what in zip(row, shown or [""], strict=False):
            _dots(axes, places, study.labels.get(what, [""] * len(places)), what)
        if study.captions.pictures:
            _thumbnails(row[-1], places, study.captions.pictures)
    _save(figure, path)


def _dots(axes: Any, places: Any, labels: Sequence[str], what: str) -> None:
    classes = sorted(set(labels) - {""}, key=lambda one: (_TONES.index(one) if one in _TONES else 99, one))
    without = [i for i, label in enumerate(labels) if not label]
    axes.scatter(places[without, 0], places[without, 1], s=6, color="lightgrey")
    for number, one in enumerate(classes):
        rows = [i for i, label in enumerate(labels) if label == one]
        colour = _COLOURS[_TONES.index(one)] if one in _TONES else f"C{number}"
        axes.scatter(
            places[rows, 0], places[rows, 1], s=14, color=colour, edgecolors="black", linewidths=0.3, label=one
        )
    axes.set_title(what, fontsize=10)
    if classes:
        axes.legend(fontsize=8)


def _thumbnails(axes: Any, places: Any, pictures: Sequence[Any]) -> None:
    import numpy
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    step = max(1, len(pictures) // _THUMBNAILS)
    for i in range(0, len(pictures), step):
        small = OffsetImage(numpy.asarray(pictures[i].resize((20, 20))), zoom=0.9)
        axes.add_artist(AnnotationBbox(small, places[i].tolist(), frameon=False, pad=0))
    axes.set_xlim(places[:, 0].min() * 1.08, places[:, 0].max() * 1.08)
    axes.set_ylim(places[:, 1].min() * 1.08, places[:, 1].max() * 1.08)
    axes.set_title("their pictures", fontsize=10)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=90)
