"""The README of an exported model: what it is, what it was trained on and under which licence, how good, how to use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dist_t2i.errors import UserError

if TYPE_CHECKING:
    from dist_t2i.inference.model_files import ModelFiles

_TEXT = {
    "dual": "Two text encoders were trained from scratch with the networks that read them: S_G for the generator,\n"
    "S_D for the discriminator",
    "shared": "One text encoder was trained from scratch by the generator's and the discriminator's losses together",
    "frozen": "The text embedding was given, not trained with the model",
}


@dataclass(frozen=True)
class SetAbout:
    """What a model should say about the pictures it was trained on; empty where it is not known."""

    name: str = ""
    licence: str = ""
    credit: str = ""
    pictures: int = 0
    """In the training split."""
    fingerprint: str = ""
    examples: tuple[str, ...] = ()
    """A few captions, held-out ones where the set has some."""

    @classmethod
    def of(cls, files: ModelFiles) -> SetAbout:
        """From the export's own record, or from the manifest of the run's set if it is still where it was."""
        if files.about.get("set"):
            known = {field.name for field in fields(cls)}
            entries = {name: value for name, value in files.about["set"].items() if name in known}
            return cls(**{**entries, "examples": tuple(entries.get("examples", ()))})
        from dist_t2i.data.open_data import open_data

        try:
            found = open_data(files.config.data)
            split = next((name for name in found.splits if name.startswith("test")), "train")
            samples = found.samples(split)
            examples = tuple(samples[i].captions[0] for i in range(min(8, len(samples))))
        except UserError:
            return cls(examples=tuple(files.config.report.sample_prompts))
        about = {**found.manifest, **found.manifest.get("about", {})}
        texts = {name: str(about.get(name) or "") for name in ("name", "licence", "credit")}
        return cls(**texts, pictures=len(found.samples("train")), fingerprint=found.fingerprint, examples=examples)


def model_card(files: ModelFiles, about: SetAbout, scores: Mapping[str, Any] | None) -> str:
    """Markdown for people and for model hubs (a YAML header names library and licence)."""
    size, example = files.config.data.image_size, (about.examples or ("a caption",))[0]
    return f"""---
library_name: dist_t2i
pipeline_tag: text-to-image
license: {_hub_licence(about.licence)}
---
# Text to {size}x{size} pictures, trained with dist_t2i

![samples](samples.png)

    import dist_t2i
    model = dist_t2i.load("this/folder")
    pictures = model.generate([{json.dumps(example, ensure_ascii=False)}], seed=0)
    pictures[0].save("picture.png")
{_edit(files, example)}
`model.embed_text(texts, which="g" or "d")`, `model.embed_image(pictures)` and `model.score(pictures, texts)` give the
embeddings and how well pictures and texts agree in the model's own opinion. Loading runs no code from this folder
(safetensors, JSON, YAML) and needs no DeepSpeed.

## What it is
A single-stage GAN: one pass makes a picture. {_TEXT[files.config.text.mode]}
(after Ahmed & Mittal, "End-to-end Training for Text-to-Image Synthesis using Dual-Text Embeddings").
{files.images:,} images were seen in training; the generator's weights are a moving average. `config.yaml` has every
setting. SHA-256 of the weights: {files.sha256()}

## What it was trained on
{_data(about)}

## How good it is
{_scores(scores)}

## Limits
It draws what its training captions describe, at {size} pixels; words that it never saw are named in a warning and
otherwise ignored or misread. It was not filtered or tested for use in products.
"""


def _edit(files: ModelFiles, example: str) -> str:
    """The line of code for a model that changes pictures, too."""
    if not files.config.edit.width:
        return ""
    return f'    model.edit("your/picture.png", {json.dumps(example, ensure_ascii=False)}).save("edit.png")\n'


def _hub_licence(licence: str) -> str:
    """The licence as model hubs spell it: `CC BY-SA 4.0` is `cc-by-sa-4.0`."""
    return licence.lower().replace(" ", "-") or "other"


def _data(about: SetAbout) -> str:
    if not (about.pictures or about.credit or about.licence):
        return "Not recorded: the set was not at hand when the model was exported. Say it here before you publish."
    lines = [f"{about.name or 'A captioned set'}: {about.pictures:,} pictures in the training split."]
    lines += [about.credit] if about.credit else []
    lines += [f"Licence of the pictures: {about.licence}."] if about.licence else []
    lines += [f"Fingerprint of the set: {about.fingerprint}."] if about.fingerprint else []
    return "\n".join(lines)


def _scores(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "Not evaluated with these weights (`python tools/evaluate.py --run DIR`)."
    from dist_t2i.eval.scores import markdown

    return markdown(scores)
