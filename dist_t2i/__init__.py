"""dist_t2i: text-to-image GANs whose two text embeddings are learned from scratch, end to end.

    import dist_t2i
    model = dist_t2i.load("runs/demo")          # a run folder, or an exported model
    pictures = model.generate(["woman pilot dark skin tone"], seed=0)

The package imports these names when they are first used, so that `dist_t2i.config.sections` and the commands' `--help`
do not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_t2i.inference.pipeline import PromptWarning, TextToImage, UnknownWordsWarning, load

__all__ = ["PromptWarning", "TextToImage", "UnknownWordsWarning", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dist_t2i.inference import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'dist_t2i' has no attribute {name!r}")
