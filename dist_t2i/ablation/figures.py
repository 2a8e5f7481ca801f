"""Figures of an ablation: samples of all arms for the same prompts and noise, and a plot of every metric by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.ablation.plan import Plan, run_folder
from dist_t2i.ablation.statistics import Measure
from dist_t2i.reporting.figures import new_figure, save_figure
from dist_t2i.reporting.image_grid import GridRow, render_grid, save_grid

if TYPE_CHECKING:
    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.eval.protocol import Protocol


def side_by_side(plan: Plan, seed: int, data: ShardSet, split: str, protocol: Protocol, out: Path) -> list[GridRow]:
    """One row for each of some evenly spaced held-out captions: the real picture, then one sample of each arm."""
    from dist_t2i.eval.measure import generate
    from dist_t2i.inference.pipeline import load

    samples = data.samples(split)
    count = min(plan.prompts, len(samples))
    selected = [samples[i * len(samples) // count] for i in range(count)]
    captions = [sample.captions[0] for sample in selected]
    columns = []
    for arm in plan.arms:
        model = load(run_folder(out, arm, seed))
        columns.append(generate(model, captions, protocol.seeds[0], protocol).permute(0, 2, 3, 1).numpy())
    size = model.image_size
    return [
        GridRow(caption, [column[row] for column in columns], sample.image.convert("RGB").resize((size, size)))
        for row, (caption, sample) in enumerate(zip(captions, selected, strict=True))
    ]


def write_grid(plan: Plan, rows: Sequence[GridRow], path: Path, title: str) -> Path:
    """Writes the rows as a PNG with the arms' labels above the columns."""
    save_grid(render_grid(rows, title=title, tile=96, columns=1, headings=[plan.label(arm) for arm in plan.arms]), path)
    return path


def plot_seeds(plan: Plan, measures: Sequence[Measure], path: Path) -> Path:
    """Plots one panel per metric: a dot for each run, a bar for each mean and interval. Needs matplotlib."""
    figure = new_figure(3.1 * len(measures), 0.5 * len(plan.arms) + 1.6)
    for number, (axes, measure) in enumerate(
        zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True)
    ):
        _panel(axes, plan, measure, first=number == 0)
    save_figure(figure, path)
    return path


def _panel(axes: Any, plan: Plan, measure: Measure, *, first: bool) -> None:
    names = [arm for arm in plan.arms if measure.values[arm]]
    for row, arm in enumerate(names):
        values = list(measure.values[arm].values())
        estimate = measure.estimate(arm)
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.45, markersize=5)
        if estimate.n > 1:
            axes.plot([estimate.low, estimate.high], [row, row], color="black", linewidth=1.2)
        axes.plot([estimate.mean], [row], "|", color="black", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(names)), [plan.label(arm) for arm in names] if first else [""] * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    name = measure.name.split(" (")
    axes.set_title(name[0], fontsize=10)
    axes.set_xlabel(f"{measure.better} is better", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
