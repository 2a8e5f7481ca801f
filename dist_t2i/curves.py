"""curves.png from metrics.jsonl: losses, logits, gradient norms, and what the machine did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_t2i import metricsfile

_PANELS = (
    ("losses", ("loss/d", "loss/g"), False),
    ("alignment (InfoNCE)", ("loss/d_alignment", "loss/g_alignment_text", "loss/g_alignment_image"), False),
    ("logits", ("logit/real", "logit/fake", "logit/mismatched"), False),
    ("gradient norms", ("grad/discriminator", "grad/generator", "grad/text"), True),
    ("images per second", ("images_per_second",), False),
    ("spread of fakes; data wait (share)", ("fake/std", "data_wait"), False),
)


def draw_curves(metrics: Path, out: Path, *, title: str = "") -> bool:
    """Draw the curves of a metrics.jsonl into a PNG; False when there is nothing to draw yet.

    Raises ImportError without matplotlib (the extras `demo` and `eval` bring it).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = metricsfile.read(metrics)
    panels = [panel for panel in _PANELS if any(name in entry for entry in entries for name in panel[1])]
    if not panels:
        return False
    figure = Figure(figsize=(12, 2.8 * -(-len(panels) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, series, log) in zip(figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat, panels):  # noqa: B905
        _panel(axes, entries, name, series, log)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title)
    aside = out.with_name(f".{out.name}.tmp")
    figure.savefig(aside, format="png", dpi=100)
    os.replace(aside, out)
    return True


def _panel(axes: Any, entries: Sequence[dict[str, Any]], title: str, series: Sequence[str], log: bool) -> None:
    for name in series:
        points = [(entry["images"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
        if not points:
            continue
        images, values = zip(*points, strict=True)
        line = axes.plot(images, values, alpha=0.25 if len(values) > 40 else 1.0, linewidth=1)[0]
        label = name.split("/")[-1].replace("_", " ")
        if len(values) > 40:
            axes.plot(images, smooth(values), color=line.get_color(), linewidth=1.5, label=label)
        else:
            line.set_label(label)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("images seen", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    if log:
        axes.set_yscale("log")


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential average over about a fiftieth of the series, corrected for its start."""
    decay = 1 - 1 / max(2.0, len(values) / 50)
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
