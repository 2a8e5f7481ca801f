"""Self-contained web pages: pictures are embedded, so a page can be mailed or opened from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from dist_t2i.reporting.image_grid import as_image
from dist_t2i.utils.files import write_atomic


def write(path: Path, title: str, body: Sequence[str]) -> Path:
    """Write a page with the HTML parts `body` atomically; returns the path of the page."""
    head = f"<meta charset=utf-8><title>{escape(title)}</title>{STYLE}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"<!doctype html><html lang=en>{head}{''.join(body)}</html>")
    return path


def file(path: Path, label: str) -> str:
    """HTML that embeds a PNG file as a wide picture."""
    return _img(path.read_bytes(), label, " class=wide")


def img(picture: np.ndarray | Image.Image, label: str) -> str:
    """HTML that embeds a small picture, uint8 [H, W, 3] or a PIL image."""
    out = io.BytesIO()
    as_image(picture).save(out, "PNG")
    return _img(out.getvalue(), label)


def _img(png: bytes, label: str, attributes: str = "") -> str:
    return f'<img{attributes} alt="{escape(label)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """HTML of a table; heads, cells and caption are plain text, not HTML."""
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{above}<tr>{head}</tr>{body}</table>"


STYLE = """<meta name=viewport content="width=device-width,initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{margin-bottom:0}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}a{color:#1a5fb4}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:1rem}
.cards figure{margin:0}.cards img{width:60px;height:60px;image-rendering:pixelated;margin-right:4px;vertical-align:top}
.real img{outline:2px solid #3c823c;margin-right:10px}figcaption{color:#555;font-size:.9rem}
.step{margin:0}.wide{max-width:100%}input[type=range]{width:100%}
table{border-collapse:collapse;margin:1rem 0;font-size:.92rem}caption{text-align:left;font-weight:600;padding:.3rem 0}
td,th{border:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}th{background:#f5f5f5}
pre{background:#f5f5f5;padding:.8rem;overflow-x:auto;font-size:.85rem}.note{color:#555;font-size:.9rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:#555}dd{margin:0;overflow-wrap:anywhere}
</style>"""
