"""Matplotlib figures without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_t2i.utils.files import replacing


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """A matplotlib Figure of this size in inches. Raises ImportError without matplotlib (extras demo, eval)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: Any, path: Path, dpi: int = 90) -> None:
    """Write the figure as a PNG atomically."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=dpi)
