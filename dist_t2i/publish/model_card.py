"""The README of an exported model: usage, architecture, training data with its licence, scores, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dist_t2i.errors import UserError
from dist_t2i.eval.scores import markdown
from dist_t2i.inference.warm_start import started_from

if TYPE_CHECKING:
    from dist_t2i.inference.model_files import ModelFiles

_TEXT = {
    "dual": "Two text encoders were trained from scratch together with the networks: S_G with the generator,\n"
    "S_D with the discriminator",
    "shared": "One text encoder was trained from scratch with the losses of both the generator and the discriminator",
    "frozen": "The text encoder was given and was not trained with the model",
}
_NOT_EVALUATED = "These weights were not evaluated (`python tools/evaluate.py --run DIR` evaluates them)."


@dataclass(frozen=True)
class SetAbout:
    """Facts about the training set for the model card. Unknown facts are empty."""

    name: str = ""
    licence: str = ""
    credit: str = ""
    pictures: int = 0
    """Number of pictures in the training split."""
    fingerprint: str = ""
    examples: tuple[str, ...] = ()
    """A few captions, from a test split if the set has one."""

    @classmethod
    def of(cls, files: ModelFiles) -> SetAbout:
        """Reads the facts from an export's model.json, or from the manifest of a run's set if that can be opened."""
        if files.about.get("set"):
            known = {field.name for field in fields(cls)}
            entries = {name: value for name, value in files.about["set"].items() if name in known}
            return cls(**{**entries, "examples": tuple(entries.get("examples", ()))})
        from dist_t2i.data.open_data import open_data

        try:
            data = open_data(files.config.data)
            split = next((name for name in data.splits if name.startswith("test")), "train")
            samples = data.samples(split)
            examples = tuple(samples[i].captions[0] for i in range(min(8, len(samples))))
        except UserError:
            return cls(examples=tuple(files.config.report.sample_prompts))
        about = {**data.manifest, **data.manifest.get("about", {})}
        texts = {name: str(about.get(name) or "") for name in ("name", "licence", "credit")}
        return cls(**texts, pictures=len(data.samples("train")), fingerprint=data.fingerprint, examples=examples)


def model_card(files: ModelFiles, about: SetAbout, scores: Mapping[str, Any] | None) -> str:
    """The model card in Markdown. Its YAML header names the library and the licence for model hubs."""
    size, example = files.config.data.image_size, json.dumps((about.examples or ("a caption",))[0], ensure_ascii=False)
    edit = f'    model.edit("your/picture.png", {example}).save("edit.png")\n' if files.config.edit.width else ""
    start = f"{started_from(files.init)}.\n" if files.init else ""
    licence = about.licence.lower().replace(" ", "-") or "other"  # as model hubs spell it: cc-by-sa-4.0
    return f"""---
library_name: dist_t2i
pipeline_tag: text-to-image
license: {licence}
---
# Text to {size}x{size} pictures, trained with dist_t2i

![samples](samples.png)

    import dist_t2i
    model = dist_t2i.load("this/folder")
    pictures = model.generate([{example}], seed=0)
    pictures[0].save("picture.png")
{edit}
`model.embed_text(texts, which="g" or "d")` and `model.embed_image(pictures)` return embeddings.
`model.score(pictures, texts)` returns how well pictures and texts agree. This score comes from the model's own
discriminator, so it is not an independent metric. Loading runs no code from this folder and needs no DeepSpeed.

## What it is
A single-stage GAN: one forward pass generates a picture. {_TEXT[files.config.text.mode]}
(after Ahmed & Mittal, "End-to-end Training for Text-to-Image Synthesis using Dual-Text Embeddings").
{start}Training saw {files.images:,} images; the generator's weights are a moving average. `config.yaml` has every setting.
SHA-256 of the weights: {files.sha256()}

## What it was trained on
{_data(about)}

## How good it is
{markdown(scores) if scores else _NOT_EVALUATED}

## Limits
The model generates what its training captions describe, at {size} pixels. It warns about words that are in no training
caption, and ignores or misreads these words. It was not filtered or tested for use in products.
"""


def _data(about: SetAbout) -> str:
    if not (about.pictures or about.credit or about.licence):
        return "The set could not be opened when the model was exported. Describe it here before you publish the model."
    size = f"{about.name or 'A captioned set'}: {about.pictures:,} pictures in the training split."
    licence = f"Licence of the pictures: {about.licence}." if about.licence else ""
    fingerprint = f"Fingerprint of the set: {about.fingerprint}." if about.fingerprint else ""
    return "\n".join(filter(None, (size, about.credit, licence, fingerprint)))
