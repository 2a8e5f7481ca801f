"""Tars in the layout of other tools, and the content of a hostile tar."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, content) in GNU format, as Python's `tarfile` writes it; returns its path."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class _Opens:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple:
        return open, (str(self._path), "w")


def harmful_pickle(makes: Path) -> bytes:
    """A pickle that creates a file when it is loaded, which shows that its code ran."""
    return pickle.dumps(_Opens(makes))
