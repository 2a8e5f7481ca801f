"""Exports a run as a folder that others can use: weights, configuration, tokenizer, samples, model card.

inference/model_files.py lists the files. The folder appears only when it is complete. It contains no paths of this
machine.
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
from dist_t2i.eval.scores import known_scores
from dist_t2i.inference import model_files
from dist_t2i.inference.model_files import ModelFiles, read_model
from dist_t2i.inference.pipeline import TextToImage
from dist_t2i.inference.warm_start import started_from
from dist_t2i.publish.model_card import SetAbout, model_card
from dist_t2i.reporting.image_grid import grid_rows, render_grid, save_grid
from dist_t2i.utils.files import file_sha256

if TYPE_CHECKING:
    from dist_t2i.config.sections import Config


def export(run: str | Path, out: str | Path, *, replace: bool = False) -> Path:
    """Exports the newest checkpoint of a run, or copies an existing export, to the new folder `out`; returns the
    folder's path.

    With `replace`, an earlier export at `out` is replaced. Raises UserError, and leaves no new files, when `out`
    contains something other than an export, when `run` contains no model, or when the disk is full.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / model_files.ABOUT).is_file():
            raise UserError(f"{out} exists, but is not an exported model; choose a new folder")
        if not replace:
            raise UserError(f"{out} already has an exported model; choose a new folder, or replace it with --force")
    files = read_model(run)
    model = TextToImage(files, "cpu")  # raises an error for an unusable model before any file is written
    about_set = SetAbout.of(files)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        _write(temporary, files, model, about_set)
        temporary.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.rename(out, old / "old")
            os.rename(temporary, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, out)
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"the export to {out} failed: {problem}; free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(folder: Path, files: ModelFiles, model: TextToImage, about_set: SetAbout) -> None:
    weights = {model_files.GENERATOR: files.generator, model_files.DISCRIMINATOR: files.discriminator}
    if files.frozen is not None:
        weights[model_files.FROZEN] = files.frozen.tensors
    for name, tensors in weights.items():  # safetensors requires contiguous tensors that share no memory
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, folder / name)
    heading = f"# {started_from(files.init)}\n" if files.init else ""
    (folder / model_files.CONFIG).write_text(heading + config_files.dump(published(files.config)), encoding="utf-8")
    files.tokenizer.save(folder / model_files.TOKENIZER)
    paths = [folder / name for name in (model_files.CONFIG, model_files.TOKENIZER, *weights)]
    about: dict[str, Any] = {
        "format": model_files.FORMAT,
        "library": "dist_t2i",
        "images": files.images,
        "init": dict(files.init) if files.init else None,
        "weights_sha256": files.sha256(),
        "set": dataclasses.asdict(about_set),
        "frozen": files.frozen.about if files.frozen else None,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths},
    }
    (folder / model_files.ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    prompts = list(model.config.report.sample_prompts or about_set.examples)[:8]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = model.generate(prompts, seed=0, images_per_prompt=4)
    save_grid(render_grid(grid_rows(prompts, images), tile=96), folder / "samples.png")
    if scores := known_scores(files.folder, files.sha256()):
        (folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(model_card(files, about_set, scores), encoding="utf-8")


def published(config: Config) -> Config:
    """The configuration without the paths and the name of the run, which matter only where it was trained."""
    run, data = dataclasses.replace(config.run, folder="", name=""), dataclasses.replace(config.data, train="")
    text = dataclasses.replace(config.text, frozen=model_files.FROZEN if config.text.mode == "frozen" else "")
    edit, train = dataclasses.replace(config.edit, init=""), dataclasses.replace(config.train, init="")
    return dataclasses.replace(config, run=run, data=data, text=text, edit=edit, train=train)
