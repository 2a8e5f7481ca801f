"""A run as one self-contained web page, RUN/report/index.html.

The page shows held-out prompts with their real pictures, sample grids, curves, scores, and the command that reproduces
the run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dist_t2i.data import scenes
from dist_t2i.eval.scores import rows as score_rows
from dist_t2i.eval.selection import is_scene
from dist_t2i.publish.model_card import SetAbout
from dist_t2i.reporting.web_page import file, img, write
from dist_t2i.utils.files import read_json

if TYPE_CHECKING:
    from dist_t2i.data.shard_set import ShardSet
    from dist_t2i.inference.pipeline import TextToImage

_GRIDS = 12  # maximum number of sample grids on the page, evenly spaced over the training


def write_page(
    run: Path, model: TextToImage, data: ShardSet, scores: Mapping[str, Any], *, title: str, command: str, prompt: str
) -> Path:
    """Write RUN/report/index.html; returns its path. `scores` is from scores.json; `command` reproduces the run, and
    the page suggests a command with `prompt`."""
    facts, config = _facts(run, model, data), (run / "config.yaml").read_text(encoding="utf-8")
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    about = SetAbout.of(model.files)
    credit = about.credit or (f"Licence of the pictures: {about.licence}" if about.licence else "")
    linked = re.sub(r"(https?://[^\s)]+)", r'<a href="\1">\1</a>', escape(credit))
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p>One forward pass through a small network generates each picture. The network and its two text embeddings were "
        "trained only on captioned pictures: nothing was pretrained.</p>",
        *(_prompts(model, data, split) for split in scores["splits"]),
        _history(run),
        "<h2>Scores</h2>" + _scores(scores),
        f"<h2>Curves</h2>{file(run / 'curves.png', 'Curves')}" if (run / "curves.png").is_file() else "",
        f"<h2>How it was made</h2><pre>{escape(command)}</pre><dl>{listed}</dl>",
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>",
        f"<h2>Pictures</h2><p>{linked}</p>" if credit else "",
        f"<h2>Next steps</h2><pre>{escape(_NEXT.format(run=run, prompt=prompt))}</pre>",
    ]
    return write(run / "report" / "index.html", title, body)


_NEXT = """\
python tools/sample.py --run {run} "{prompt}" --out grid.png
python tools/export.py --run {run} --out model
python tools/evaluate.py --run {run}"""
_NOTES = {
    "test-combinations": (
        "Prompts that the model never saw",
        "Training saw every word, but never this combination of words. The framed picture is the real one, which "
        "training did not see. The other pictures are generated. The prompts are the first of the split, not selected.",
    ),
    "test-nouns": (
        "Words that the model never saw",
        "These nouns are in no training caption, so the model can use only the other words of a prompt.",
    ),
}
_RENDERED = (
    "Training saw every word, but never this combination of words. The framed pictures are real ones of the same "
    "caption. The other eight pictures are generated, each from noise of its own. They should differ as the real ones "
    "do. The prompts are the first of the split, not selected."
)


def _prompts(model: TextToImage, data: ShardSet, split: str) -> str:
    """The first captions of a split in the set's order (by hash), each with real and generated pictures.

    Four generated pictures stand next to the real picture of a caption. Where the project can render further real
    pictures of a caption, eight generated pictures stand next to four real ones.
    """
    held_out = data.samples(split)
    rendered = len(held_out) > 0 and is_scene(held_out[0].attributes)
    limit, count = (12, 8) if rendered else (6 if split == "test-nouns" else 24, 4)
    samples = [held_out[i] for i in range(min(limit, len(held_out)))]
    captions = [sample.captions[0] for sample in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the prompts of some splits contain words that the model never saw
        pictures = model.generate(captions, seed=0, images_per_prompt=count)
    heading, note = _NOTES.get(split, (f"Held-out prompts ({split})", "The framed picture is the real one."))
    note = _RENDERED if rendered else note
    cards = []
    for i, sample in enumerate(samples):
        generated = "".join(img(picture, "generated picture") for picture in pictures[i * count : (i + 1) * count])
        shown = [sample.image, *_rendered(sample.attributes, i, model.image_size)] if rendered else [sample.image]
        real = "".join(f"<span class=real>{img(picture, 'the real picture')}</span>" for picture in shown)
        cards.append(f"<figure>{real}{generated}<figcaption>{escape(captions[i])}</figcaption></figure>")
    return f"<h2>{escape(heading)}</h2><p>{escape(note)}</p><div class=cards>{''.join(cards)}</div>"


def _rendered(attributes: Mapping[str, Any], row: int, size: int) -> list[Image.Image]:
    """Three further real pictures of the caption of a scene."""
    return [Image.fromarray(scenes.render(scenes.same_caption(attributes, row, index), size)) for index in range(3)]


def _history(run: Path) -> str:
    """The run's sample grids with a slider; without JavaScript, all grids appear one below the other."""
    found = ((re.fullmatch(r"images-(\d+)", path.stem), path) for path in (run / "samples").glob("*.png"))
    grids = sorted((int(match[1]), path) for match, path in found if match)
    if len(grids) > _GRIDS:
        grids = [grids[round(i * (len(grids) - 1) / (_GRIDS - 1))] for i in range(_GRIDS)]
    if not grids:
        return ""
    labels = ((f"after {images:,} images", path) for images, path in grids)
    steps = (
        f"<figure class=step><figcaption>{label}</figcaption>{file(path, label)}</figure>" for label, path in labels
    )
    last = len(grids) - 1
    slider = f'<input id=when type=range min=0 max={last} value={last} aria-label="when in training">'
    return f"<h2>Samples during training</h2><p>Drag to see earlier states.</p>{slider}{''.join(steps)}{_SLIDER}"


def _scores(scores: Mapping[str, Any]) -> str:
    parts = []
    for split, pictures, rows in score_rows(scores):
        parts.append(
            f"<table><caption>{escape(split)}: {pictures:,} held-out pictures</caption><tr><th>score</th><th>this "
            "model (95% interval over captions)</th><th>better</th><th>floor</th><th>ceiling</th></tr>"
        )
        for name, value, better, floor, ceiling in rows:
            cells = [escape(name), f"<b>{escape(value)}</b>", escape(better)]
            cells += [escape(end).replace("; ", "<br>") for end in (floor, ceiling)]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts.append("</table>")
    protocol = scores["protocol"]
    networks = ", ".join(network["name"] for network in scores["manifest"]["judges"].values())
    metrics = {entry.partition("/")[0] for entry in protocol["metrics"]}
    note = [
        f"Protocol {protocol['name']} version {protocol['version']}: {len(protocol['seeds'])} generated pictures per "
        f"caption. Feature networks: {networks}. EfficientNet-Lite0 is an ImageNet classifier that was not used in "
        "training. Its KID is not comparable with KID or FID from Inception features.",
        *(text.format(**protocol) for metric, text in _METRIC_NOTES.items() if metric in metrics),
    ]
    return "".join(parts) + f"<p class=note>{escape(' '.join(note))}</p>"


_METRIC_NOTES = {
    "retrieval": "R@k: is the real picture among the k nearest of {gallery}?",
    "diversity": "Diversity: how far apart the pictures of one caption are, relative to real pictures; 0: all are equal.",
    "attributes": "Attributes: what a detector that was trained on rendered scenes only finds in the pictures; the "
    "ceiling shows the detector's own errors.",
    "styles": "Styles: colored or black by the strength of the color; neither: between the two.",
}
"""Metric -> what its scores mean, for a page whose protocol has the metric."""


def _facts(run: Path, model: TextToImage, data: ShardSet) -> dict[str, str]:
    environment = read_json(run / "environment.json")
    processor, code, packages = (environment.get(name, {}) for name in ("processor", "code", "packages"))
    hardware = ", ".join(gpu["name"] for gpu in environment.get("gpus", [])) or processor.get("model", "")
    versions = (f"{name} {packages[name]}" for name in ("torch", "deepspeed", "dist-t2i") if name in packages)
    facts = {
        "images seen": f"{model.images_seen:,}",
        "divergences": _divergences(model.files.divergences),
        "hardware": f"{hardware}, {processor.get('cores', '?')} cores" if hardware else "",
        "versions": ", ".join(versions),
        "code": code.get("revision", "") + (" with local changes" if code.get("dirty") else ""),
        "data": f"{data.manifest.get('name', Path(data.folder).name)}, fingerprint {data.fingerprint}",
        "weights": f"SHA-256 {model.files.sha256()}",
    }
    return {name: value for name, value in facts.items() if value}


def _divergences(found: Sequence[Mapping[str, Any]]) -> str:
    after = {True: "the run rewound and halved its learning rates", False: "a person continued the run"}
    return "; ".join(f"at {d['at']:,} images, {d['reason']}: {after[d['rewound']]}" for d in found)


_SLIDER = """<script>
const when=document.getElementById('when'),steps=document.querySelectorAll('.step');
const show=()=>steps.forEach((step,i)=>step.style.display=i==when.value?'':'none');
when.addEventListener('input',show);show();
</script>"""
