"""A run as a folder that others can use: weights, configuration, tokenizer, model card. `modelfiles.py` draws it.

Written aside and renamed, so an export exists whole or not at all. Nothing of the machine goes in: no paths, no names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from dist_t2i.config import files as config_files
from dist_t2i.errors import UserError
from dist_t2i.inference.model_files import (
    ABOUT,
    CONFIG,
    DISCRIMINATOR,
    FORMAT,
    FROZEN,
    GENERATOR,
    TOKENIZER,
    ModelFiles,
    read_model,
)
from dist_t2i.inference.pipeline import TextToImage
from dist_t2i.publish.model_card import SetAbout, model_card
from dist_t2i.reporting.image_grid import GridRow, draw_grid, save_grid
from dist_t2i.utils.files import file_sha256

if TYPE_CHECKING:
    from dist_t2i.config.sections import Config

SCORES = "scores.json"
SAMPLES = "samples.png"


def export(run: str | Path, out: str | Path, *, replace: bool = False) -> Path:
    """Writes the newest checkpoint of a run (or another export) to the new folder `out`; returns its path.

    With `replace`, an earlier export at `out` makes room. Raises UserError when `out` holds anything else, or `run` no
    model, or the disk is full (then nothing is left behind).
    """
    out = Path(out)
    _check_target(out, replace)
    files = read_model(run)
    model = TextToImage(files, "cpu")  # an export that cannot be used is not written
    about_set = SetAbout.of(files)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        _write(aside, files, model, about_set)
        aside.chmod(0o755)
        _put(aside, out)
    except OSError as error:
        raise UserError(
            f"the export to {out} failed: {error.strerror or error}; free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _check_target(out: Path, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / ABOUT).is_file():
        raise UserError(f"{out} exists and is not an exported model; choose a new folder")
    if not replace:
        raise UserError(f"{out} holds an exported model already; choose a new folder, or replace it with --force")


def _put(aside: Path, out: Path) -> None:
    """Renames the finished folder to its place; an earlier export is moved away first, and then deleted."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        os.rename(out, old / "old")
        os.rename(aside, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(aside, out)


def _write(folder: Path, files: ModelFiles, model: TextToImage, about_set: SetAbout) -> None:
    config = published(files.config)
    save_file(_plain(files.generator), folder / GENERATOR)
    save_file(_plain(files.discriminator), folder / DISCRIMINATOR)
    if files.frozen is not None:
        save_file(_plain(files.frozen.tensors), folder / FROZEN)
    (folder / CONFIG).write_text(config_files.dump(config), encoding="utf-8")
    files.tokenizer.save(folder / TOKENIZER)
    names = [CONFIG, TOKENIZER, GENERATOR, DISCRIMINATOR] + ([FROZEN] if files.frozen else [])
    about: dict[str, Any] = {
        "format": FORMAT,
        "library": "dist_t2i",
        "images": files.images,
        "weights_sha256": files.sha256(),
        "set": dataclasses.asdict(about_set),
        "frozen": files.frozen.about if files.frozen else None,
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names
        },
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    save_grid(sample_grid(model, about_set), folder / SAMPLES)
    scores = _scores(files)
    if scores is not None:
        (folder / SCORES).write_text(json.dumps(scores, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(model_card(files, about_set, scores), encoding="utf-8")


def published(config: Config) -> Config:
    """The configuration without what belongs to one machine or person: paths and the run's name."""
    text = dataclasses.replace(config.text, frozen=FROZEN if config.text.mode == "frozen" else "")
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder="", name=""),
        data=dataclasses.replace(config.data, train=""),
        text=text,
        edit=dataclasses.replace(config.edit, init=""),
    )


def sample_grid(model: TextToImage, about_set: SetAbout, pictures: int = 4):
    """A grid of the run's sample prompts, or of example captions of its set."""
    prompts = list(model.config.report.sample_prompts or about_set.examples)[:8]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = model.generate(prompts, seed=0, images_per_prompt=pictures)
    rows = [GridRow(prompt, images[i * pictures : (i + 1) * pictures]) for i, prompt in enumerate(prompts)]
    return draw_grid(rows, tile=96)


def _plain(tensors) -> dict:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _scores(files: ModelFiles) -> dict[str, Any] | None:
    """scores.json of the folder, if it was made with exactly these weights."""
    from dist_t2i.eval.scores import read_scores

    try:
        scores = read_scores(files.folder / SCORES)
    except UserError:
        return None
    return scores if scores["manifest"]["weights_sha256"] == files.sha256() else None
