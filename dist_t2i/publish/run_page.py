"""A run as one web page: held-out prompts beside their real pictures, how it learned, curves, scores, how it was made.

RUN/report/index.html holds its pictures itself, loads nothing from elsewhere, and can be mailed or opened from disk.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.checkpoint.store import images_in
from dist_t2i.eval.scores import rows as score_rows
from dist_t2i.publish.model_card import SetAbout
from dist_t2i.reporting.web_page import file, img, text, write

if TYPE_CHECKING:
    from PIL.Image import Image

    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

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
        f"<h1>{text(title)}</h1>",
        "<p>One pass through a small network makes each picture. It learned from captioned pictures alone, its two text "
        "embeddings included: nothing in it was pretrained.</p>",
        *(_prompts(split, chosen) for split, chosen in rows.items()),
        _history(run),
        "<h2>Scores</h2>" + _scores(scores),
        _picture_section("Curves", run / "curves.png"),
        _made(command, facts, config),
        _credit(about),
        "<h2>Go on</h2><pre>"
        + text(
            f'python tools/sample.py --run {name} "woman astronaut dark skin tone" --out grid.png\n'
            f"python tools/export.py --run {name} --out model\n"
            f"python tools/evaluate.py --run {name}"
        )
        + "</pre>",
    ]
    return write(run / "report" / "index.html", title, body)


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
        generated = "".join(img(picture, "drawn by the model") for picture in row.generated)
        real = f"<span class=real>{img(row.real, 'the real picture')}</span>"
        cards.append(f"<figure>{real}{generated}<figcaption>{text(row.caption)}</figcaption></figure>")
    return f"<h2>{text(heading)}</h2><p>{text(note)}</p><div class=cards>{''.join(cards)}</div>"


def _history(run: Path) -> str:
    """The sample grids of the run behind a slider; all of them, one below the other, without JavaScript."""
    found = ((images_in(path.stem), path) for path in (run / "samples").glob("*.png"))
    grids = sorted((images, path) for images, path in found if images is not None)
    if len(grids) > GRIDS:
        grids = [grids[round(i * (len(grids) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    if not grids:
        return ""
    figures = []
    for images, path in grids:
        label = f"after {images:,} images"
        figures.append(f"<figure class=step><figcaption>{label}</figcaption>{file(path, label)}</figure>")
    last = len(grids) - 1
    slider = f'<input id=when type=range min=0 max={last} value={last} aria-label="when in training">'
    return f"<h2>How it learned</h2><p>Drag to go back in training.</p>{slider}{''.join(figures)}{_SLIDER}"


def _scores(scores: Mapping[str, Any]) -> str:
    parts = []
    for split, pictures, rows in score_rows(scores):
        parts.append(
            f"<table><caption>{text(split)}: {pictures:,} held-out pictures</caption><tr><th>score</th><th>this "
            "model (95% interval over captions)</th><th>better</th><th>floor</th><th>ceiling</th></tr>"
        )
        for name, value, better, floor, ceiling in rows:
            cells = [text(name), f"<b>{text(value)}</b>", text(better)]
            cells += [text(end).replace("; ", "<br>") for end in (floor, ceiling)]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts.append("</table>")
    rules = scores["protocol"]
    judges = ", ".join(judge["name"] for judge in scores["manifest"]["judges"].values())
    note = (
        f"Protocol {rules['name']} version {rules['version']}: {len(rules['seeds'])} drawings a caption; R@k: is the real "
        f"picture among the k nearest, of {rules['gallery']}? Judges: {judges}. EfficientNet-Lite0 is an ImageNet "
        "classifier that had no part in training: its KID is not comparable with KID or FID by Inception features."
    )
    return "".join(parts) + f"<p class=note>{text(note)}</p>"


def _made(command: str, facts: Mapping[str, str], config: str) -> str:
    listed = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    return (
        f"<h2>How it was made</h2><pre>{text(command)}</pre><dl>{listed}</dl>"
        f"<details><summary>Configuration</summary><pre>{text(config)}</pre></details>"
    )


def _credit(about: SetAbout) -> str:
    said = about.credit or (f"Licence of the pictures: {about.licence}" if about.licence else "")
    linked = re.sub(r"(https?://[^\s)]+)", r'<a href="\1">\1</a>', text(said))
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
    return f"<h2>{text(heading)}</h2>{file(path, heading)}" if path.is_file() else ""


_SLIDER = """<script>
const when=document.getElementById('when'),steps=document.querySelectorAll('.step');
const show=()=>steps.forEach((step,i)=>step.style.display=i==when.value?'':'none');
when.addEventListener('input',show);show();
</script>"""
