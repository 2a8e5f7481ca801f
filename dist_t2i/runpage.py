"""A run as one web page: held-out prompts beside their real pictures, how it learned, curves, scores, how it was made.

RUN/report/index.html holds its pictures itself, loads nothing from elsewhere, and can be mailed or opened from disk.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.eval.scores import rows as score_rows
from dist_t2i.modelcard import SetAbout

if TYPE_CHECKING:
    from PIL.Image import Image

    from dist_t2i.data.shards import ShardSet
    from dist_t2i.pipeline import TextToImage

GRIDS = 12
"""Sample grids shown at most, evenly spread over training."""


@dataclass(frozen=True)
class PromptRow:
    """A held-out caption, the real picture it was written for, and what the model drew."""

    caption: str
    real: Image
    generated: Sequence[Image]


def held_out_rows(model: TextToImage, data: ShardSet, split: str, count: int, pictures: int = 4) -> list[PromptRow]:
    """`count` captions of a split with `pictures` drawings each; chosen by the set's own (hashed) order, not by looks."""
    samples = data.samples(split)
    chosen = [samples[i] for i in range(min(count, len(samples)))]
    captions = [sample.captions[0] for sample in chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # words that the model never saw are the point of some splits
        drawn = model.generate(captions, seed=0, images_per_prompt=pictures)
    parts = [drawn[i * pictures : (i + 1) * pictures] for i in range(len(chosen))]
    return [PromptRow(caption, s.image, part) for caption, s, part in zip(captions, chosen, parts, strict=True)]


def write_page(
    run: Path,
    *,
    title: str,
    rows: Mapping[str, Sequence[PromptRow]],
    scores: Mapping[str, Any],
    about: SetAbout,
    config: str,
    command: str,
    facts: Mapping[str, str],
) -> Path:
    """Writes RUN/report/index.html, whole or not at all, and returns its path.

    rows: split -> held-out prompts. scores: as in scores.json. config: the run's YAML. command: how to make it again.
    facts: what else to say about the run, in order.
    """
    name = str(run)
    body = [
        f"<h1>{_text(title)}</h1>",
        "<p>One pass through a small network makes each picture. It learned from captioned pictures alone, its two text "
        "embeddings included: nothing in it was pretrained.</p>",
        *(_prompts(split, chosen) for split, chosen in rows.items()),
        _history(run),
        "<h2>Scores</h2>" + _scores(scores),
        _picture_section("Curves", run / "curves.png"),
        _made(command, facts, config),
        _credit(about),
        "<h2>Go on</h2><pre>"
        + _text(
            f'python tools/sample.py --run {name} "woman astronaut dark skin tone" --out grid.png\n'
            f"python tools/export.py --run {name} --out model\n"
            f"python tools/evaluate.py --run {name}"
        )
        + "</pre>",
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(title)}</title>{_STYLE}{''.join(body)}</html>"
    )
    path = run / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(".index.html.part")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def _prompts(split: str, rows: Sequence[PromptRow]) -> str:
    told = {
        "test-combinations": (
            "Prompts it never saw",
            "Every word was in training, never in this combination. Framed: the real picture, which training never saw "
            "either. Beside it: four drawings of the model. Taken in order, not picked.",
        ),
        "test-nouns": (
            "Words it never saw",
            "These nouns occur in no training caption. It cannot know them; this is what it makes of the rest.",
        ),
    }
    heading, note = told.get(split, (f"Held-out prompts ({split})", "Framed: the real picture. Not picked."))
    cards = []
    for row in rows:
        generated = "".join(_img(picture, "drawn by the model") for picture in row.generated)
        real = f"<span class=real>{_img(row.real, 'the real picture')}</span>"
        cards.append(f"<figure>{real}{generated}<figcaption>{_text(row.caption)}</figcaption></figure>")
    return f"<h2>{_text(heading)}</h2><p>{_text(note)}</p><div class=cards>{''.join(cards)}</div>"


def _history(run: Path) -> str:
    """The sample grids of the run behind a slider; all of them, one below the other, without JavaScript."""
    grids = sorted((run / "samples").glob("images-*.png"))
    if len(grids) > GRIDS:
        grids = [grids[round(i * (len(grids) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    if not grids:
        return ""
    figures = []
    for path in grids:
        images = int(re.sub(r"\D", "", path.stem))
        label = f"after {images:,} images"
        figures.append(f"<figure class=step><figcaption>{label}</figcaption>{_file(path, label)}</figure>")
    last = len(grids) - 1
    slider = f'<input id=when type=range min=0 max={last} value={last} aria-label="when in training">'
    return f"<h2>How it learned</h2><p>Drag to go back in training.</p>{slider}{''.join(figures)}{_SLIDER}"


def _scores(scores: Mapping[str, Any]) -> str:
    parts, shown = [], ""
    for split, pictures, (name, value, better, floor, ceiling) in score_rows(scores):
        if split != shown:
            parts.append("</table>" if shown else "")
            parts.append(
                f"<table><caption>{_text(split)}: {pictures:,} held-out pictures</caption><tr><th>score</th><th>this "
                "model (95% interval over captions)</th><th>better</th><th>floor</th><th>ceiling</th></tr>"
            )
            shown = split
        cells = [_text(name), f"<b>{_text(value)}</b>", _text(better)]
        cells += [_text(end).replace("; ", "<br>") for end in (floor, ceiling)]
        parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    rules = scores["protocol"]
    judges = ", ".join(judge["name"] for judge in scores["manifest"]["judges"].values())
    note = (
        f"Protocol {rules['name']} version {rules['version']}: {len(rules['seeds'])} drawings a caption; R@k: is the real "
        f"picture among the k nearest, of {rules['gallery']}? Judges: {judges}. EfficientNet-Lite0 is an ImageNet "
        "classifier that had no part in training: its KID is not comparable with KID or FID by Inception features."
    )
    return "".join(parts) + f"</table><p class=note>{_text(note)}</p>"


def _made(command: str, facts: Mapping[str, str], config: str) -> str:
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return (
        f"<h2>How it was made</h2><pre>{_text(command)}</pre><dl>{listed}</dl>"
        f"<details><summary>Configuration</summary><pre>{_text(config)}</pre></details>"
    )


def _credit(about: SetAbout) -> str:
    said = about.credit or (f"Licence of the pictures: {about.licence}" if about.licence else "")
    linked = re.sub(r"(https?://[^\s)]+)", r'<a href="\1">\1</a>', _text(said))
    return f"<h2>Pictures</h2><p>{linked}</p>" if said else ""


def facts_of(run: Path, model: TextToImage, data: ShardSet) -> dict[str, str]:
    """What a reader wants to know about how a run was made, from its files."""
    try:
        made = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = {}
    processor, code = made.get("processor", {}), made.get("code", {})
    packages = made.get("packages", {})
    hardware = ", ".join(gpu["name"] for gpu in made.get("gpus", [])) or processor.get("model", "")
    facts = {
        "images seen": f"{model.images_seen:,}",
        "hardware": f"{hardware}, {processor.get('cores', '?')} cores" if hardware else "",
        "versions": ", ".join(
            f"{name} {packages[name]}" for name in ("torch", "deepspeed", "dist-t2i") if name in packages
        ),
        "code": code.get("revision", "") + (" with local changes" if code.get("dirty") else ""),
        "data": f"{data.manifest.get('name', Path(data.folder).name)}, fingerprint {data.fingerprint}",
        "weights": f"SHA-256 {model.files.sha256()}",
    }
    return {name: value for name, value in facts.items() if value}


def _picture_section(heading: str, path: Path) -> str:
    return f"<h2>{_text(heading)}</h2>{_file(path, heading)}" if path.is_file() else ""


def _file(path: Path, label: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class=wide alt="{_text(label)}" src="data:image/png;base64,{data}">'


def _img(image: Image, label: str) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{_text(label)}" src="data:image/png;base64,{data}">'


def _text(value: str) -> str:
    return html.escape(value, quote=True)


_STYLE = """<meta name=viewport content="width=device-width,initial-scale=1"><style>
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

_SLIDER = """<script>
const when=document.getElementById('when'),steps=document.querySelectorAll('.step');
const show=()=>steps.forEach((step,i)=>step.style.display=i==when.value?'':'none');
when.addEventListener('input',show);show();
</script>"""
