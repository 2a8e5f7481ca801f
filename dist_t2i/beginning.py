"""A run that begins with the weights of a trained model (`edit.init`) instead of fresh ones."""

from __future__ import annotations

from dist_t2i.config.fields import flatten
from dist_t2i.config.resume import is_free
from dist_t2i.config.sections import Config
from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.errors import ConfigError, UserError
from dist_t2i.inference.model_files import ModelFiles, read_model
from dist_t2i.models.networks import Networks
from dist_t2i.utils.tensors import fill

_SAME = ("model.", "text.mode", "text.encoder", "text.embedding", "text.layers", "text.heads", "data.image_size")


def read_beginning(config: Config, tokenizer: Tokenizer) -> ModelFiles | None:
    """The model that `edit.init` names; None where it names none.

    Raises ConfigError when it cannot be read, when its networks are not those of `config`, or its words not those of the
    set.
    """
    if not config.edit.init:
        return None
    try:
        files = read_model(config.edit.init)
    except UserError as error:
        raise ConfigError(f"edit.init: {error}", [str(error)]) from None
    ours, theirs = flatten(config), flatten(files.config)
    same = [key for key in ours if key.startswith(_SAME) and not is_free(key, config)]
    if files.config.edit.width:
        same.append("edit.width")
    lines = [f"{key}: is {ours[key]!r}, there {theirs[key]!r}" for key in same if ours[key] != theirs[key]]
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(
            f"edit.init: {files.folder} has other networks than this run:{listed}\nMake them agree.", lines
        )
    if files.tokenizer != tokenizer:
        line = f"edit.init: {files.folder} was trained with another tokenizer than that of data.train: use the set that it knows"
        raise ConfigError(line, [line])
    return files


def begin_with(networks: Networks, files: ModelFiles) -> None:
    """Gives fresh networks the weights of a model: the generator's moving average, the discriminator as it was last.

    What the model lacks, the encoder of source pictures, stays fresh. Raises UserError when a file was tampered with.
    """
    g, d, where = networks.generator, networks.discriminator, files.folder
    fill(g.generator, files.generator, "generator.", where)
    fill(d.discriminator, files.discriminator, "discriminator.", where)
    if g.text_g is not None and d.text_d is not None:
        fill(g.text_g, files.generator, "text_g.", where)
        fill(d.text_d, files.discriminator, "text_d.", where)
    if networks.text is not None:
        fill(networks.text.text, files.discriminator, "text.", where)
    if g.source is not None and files.config.edit.width:
        fill(g.source, files.generator, "source.", where)
