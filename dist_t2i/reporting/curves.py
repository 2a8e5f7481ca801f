"""Plots curves.png from metrics.jsonl: losses, logits, gradient norms, scores, speed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_t2i.reporting import metrics_log
from dist_t2i.reporting.figures import new_figure, save_figure

_PANELS = (
    ("losses", r"loss/[dg](_adversarial)?", False),
    ("alignment (InfoNCE)", r"loss/[dg]_alignment.*", False),
    ("logits", r"logit/.*", False),
    ("gradient norms", r"grad/.*", True),
    ("images per second", r"images_per_second", False),
    ("evaluation: distances", r"eval/.*/[kf]id.*", False),
    ("evaluation: shares", r"eval/.*/(r_)?(recall|precision|tone).*", False),
    ("evaluation: scores", r"eval/.*/(clip|inception)_score.*", False),
    ("spread of fakes and real pictures, share of time waiting for data", r"(fake|real)/std|data_wait", False),
)
"""For each panel: heading, pattern of the names of its metrics, and whether the vertical axis is logarithmic."""


def plot_curves(metrics: Path, out: Path, *, title: str = "") -> bool:
    """Plot a metrics.jsonl as a PNG; False if nothing can be plotted. Raises ImportError without matplotlib."""
    entries = metrics_log.read(metrics)
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    matches = [[name for name in names if re.fullmatch(pattern, name)] for _, pattern, _ in _PANELS]
    panels = [(heading, found, log) for (heading, _, log), found in zip(_PANELS, matches, strict=True) if found]
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    height = 2.8 * rows
    figure = new_figure(12, height, layout=None)  # fixed margins: matplotlib's layout engines double the time
    figure.subplots_adjust(0.05, 0.5 / height, 0.99, 1 - 0.7 / height, wspace=0.12, hspace=0.38)
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, entries, *panel)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title)
    save_figure(figure, out, dpi=100)
    return True


def _panel(axes: Any, entries: Sequence[dict[str, Any]], title: str, series: Sequence[str], log: bool) -> None:
    for name in series:
        points = [(entry["images"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
        if not points:
            continue
        images, values = zip(*points, strict=True)
        line = axes.plot(images, values, alpha=0.25 if len(values) > 40 else 1.0, linewidth=1)[0]
        if len(values) > 40:
            line = axes.plot(images, smooth(values), color=line.get_color(), linewidth=1.5)[0]
        line.set_label(re.sub("^(loss|logit|grad|eval)/", "", name).replace("_", " "))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("images seen", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    if log:
        axes.set_yscale("log")


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the series, with bias correction at its start."""
    decay = 1 - 1 / max(2.0, len(values) / 50)
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
