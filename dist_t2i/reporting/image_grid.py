"""Sample grids: one row per caption with the caption, the real picture (if any) and the generated pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_t2i.utils.files import replacing

_INK, _PAPER, _FRAME = (30, 30, 30), (255, 255, 255), (60, 130, 60)
_GAP, _TEXT_WIDTH, _FONT_SIZE = 6, 230, 13


@dataclass(frozen=True)
class GridRow:
    """A caption with its pictures, each uint8 [H, W, 3] or a PIL image; `real` is the picture that the caption describes."""

    caption: str
    generated: Sequence[np.ndarray | Image.Image]
    real: np.ndarray | Image.Image | None = None


def grid_rows(captions: Sequence[str], pictures: Sequence) -> list[GridRow]:
    """One row per caption; `pictures` is ordered by caption, with the same number of pictures for each."""
    count = len(pictures) // max(1, len(captions))
    parts = (pictures[i * count : (i + 1) * count] for i in range(len(captions)))
    return [GridRow(caption, part) for caption, part in zip(captions, parts, strict=True)]


def render_grid(
    rows: Sequence[GridRow],
    *,
    title: str = "",
    tile: int = 128,
    columns: int | None = None,
    headings: Sequence[str] = (),
) -> Image.Image:
    """All rows as one picture, in `columns` blocks (default: two for more than eight rows).

    `headings` are printed above the columns of generated pictures. Pictures smaller than `tile` pixels are enlarged
    without smoothing.
    """
    blocks = columns or (2 if len(rows) > 8 else 1)
    tile = max(tile, *(as_image(picture).width for row in rows for picture in row.generated)) if rows else tile
    step, real = tile + _GAP, any(row.real is not None for row in rows)
    pictures = max((len(row.generated) for row in rows), default=0) + real
    width, lines = _TEXT_WIDTH + pictures * step + 2 * _GAP, -(-len(rows) // blocks)
    above = _GAP + (_FONT_SIZE + 3 * _GAP if title else 0)
    top = above + (2 * (_FONT_SIZE + 4) + _GAP if headings else 0)
    grid = Image.new("RGB", (width * blocks, top + lines * step), _PAPER)
    draw, font = ImageDraw.Draw(grid), load_font(_FONT_SIZE)
    if title:
        draw.text((_GAP, _GAP), title, _INK, font)
    for block in range(blocks):
        for column, heading in enumerate(headings, start=int(real)):
            corner = block * width + _GAP + _TEXT_WIDTH + column * step, above
            draw.multiline_text(corner, wrap(heading, tile, 2, font), _INK, font, spacing=4)
    for index, row in enumerate(rows):
        block, line = divmod(index, lines)
        _render_row(grid, draw, font, row, (block * width + _GAP, top + line * step), tile)
    return grid


def _render_row(
    grid: Image.Image, draw: ImageDraw.ImageDraw, font: Any, row: GridRow, corner: tuple[int, int], tile: int
):
    left, top = corner
    text = wrap(row.caption, _TEXT_WIDTH - 2 * _GAP, tile // (_FONT_SIZE + 4), font)
    draw.multiline_text((left, top + tile // 2), text, _INK, font, anchor="lm", spacing=4)
    left += _TEXT_WIDTH
    if row.real is not None:
        grid.paste(_enlarge(row.real, tile), (left, top))
        draw.rectangle((left, top, left + tile - 1, top + tile - 1), outline=_FRAME, width=2)
        draw.text((left + 4, top + tile - 4), "real", _FRAME, font, anchor="ls", stroke_width=2, stroke_fill=_PAPER)
        left += tile + _GAP
    for picture in row.generated:
        grid.paste(_enlarge(picture, tile), (left, top))
        left += tile + _GAP


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans (most alphabets) from matplotlib if it is installed, else Pillow's built-in font (Latin)."""
    matplotlib = find_spec("matplotlib")
    if matplotlib and matplotlib.origin:
        font = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if font.is_file():
            return ImageFont.truetype(str(font), size)
    return ImageFont.load_default(size)


def wrap(text: str, width: int, lines: int, font: Any) -> str:
    """`text` broken at spaces, and inside words that are too wide, into at most `lines` lines of `width` pixels."""
    wrapped: list[str] = []
    for word in text.split()[:200]:
        if len(wrapped) > lines:
            break
        if wrapped and font.getlength(f"{wrapped[-1]} {word}") <= width:
            wrapped[-1] += f" {word}"
            continue
        while word:  # a letter is at least a pixel wide, so at most `width` fit
            fitting = (n for n in range(min(len(word), width), 1, -1) if font.getlength(word[:n]) <= width)
            size = next(fitting, 1)
            wrapped.append(word[:size])
            word = word[size:]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: max(1, len(wrapped[lines - 1]) - 3)] + "..."]
    return "\n".join(wrapped)


def as_image(picture: np.ndarray | Image.Image) -> Image.Image:
    """A picture, uint8 [H, W, 3] or a PIL image, as an RGB image."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture, "RGB")


def _enlarge(picture: np.ndarray | Image.Image, tile: int) -> Image.Image:
    image = as_image(picture)
    return image.resize((tile, tile), Image.Resampling.NEAREST if image.width < tile else Image.Resampling.LANCZOS)


def save_grid(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically; creates the folders in its path if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        image.save(part, format="PNG")
