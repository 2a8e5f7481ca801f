"""The configuration of a run."""

from dist_t2i.config.sections import Config

__all__ = ["Config"]
