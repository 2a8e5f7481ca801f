"""What names data: a path, `file://...`, or a URL of an object store; braces and globs that stand for many.

Names are data from a configuration: nothing here runs a command. webdataset runs `pipe:...` in a shell; this refuses it.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from dist_t2i.errors import DataError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_COMMANDS = ("pipe:", "|", "exec:", "shell:", "cmd:", "gopen:")
_GLOB = re.compile(r"[*?\[]")
_MAX_NAMES = 10_000_000


def scheme_of(url: str) -> str:
    """`s3` of `s3://bucket/key`, "" of a path."""
    found = _SCHEME.match(url)
    return found.group(1).lower() if found else ""


def is_local(url: str) -> bool:
    return scheme_of(url) in ("", "file")


def checked(url: str) -> str:
    """The URL as it is. Raises DataError when it is a command, or chained with one."""
    for part in url.split("::"):
        if part.strip().lower().startswith(_COMMANDS):
            raise DataError(f"{url}: commands are not run; name a file, a folder or a URL")
    return url


def unchained(url: str) -> str:
    """The URL as it is. Raises DataError when it is a command, or chains file systems with `::`."""
    if "::" in checked(url) and "://" in url:
        raise DataError(f"{url}: file systems are not chained with `::`; name one URL")
    return url


def local_path(url: str) -> Path:
    """The path that a plain path or a `file://` URL names. Raises DataError for everything else."""
    scheme = scheme_of(checked(url))
    if scheme == "file":
        return Path(url[len("file://") :])
    if scheme:
        raise DataError(f"{url}: a local folder is needed here, not {scheme}://")
    return Path(url)


def join(base: str, name: str) -> str:
    """`name` in the folder `base`; a name that is a URL or an absolute path stands for itself."""
    if scheme_of(name) or os.path.isabs(name):
        return checked(name)
    if is_local(base):
        return str(local_path(base) / name)
    address, question, query = base.partition("?")
    return f"{address.rstrip('/')}/{name}{question}{query}"


def parent(url: str) -> str:
    """The folder of a file."""
    if is_local(url):
        return str(local_path(url).parent)
    return url.partition("?")[0].rpartition("/")[0]


def base_name(url: str) -> str:
    """The last part of the name, without the query of a URL."""
    return posixpath.basename(url.partition("?")[0] if scheme_of(url) else url.replace(os.sep, "/"))


def beside(url: str, suffix: str) -> str:
    """The file of the same name with another suffix: `a/b.tar` -> `a/b.index`."""
    if is_local(url):
        return str(local_path(url).with_suffix(suffix))
    address, question, query = url.partition("?")
    return f"{posixpath.splitext(address)[0]}{suffix}{question}{query}"


def expand(patterns: str | Sequence[str], directory: Path | None = None) -> list[str]:
    """The names that a list of patterns stands for, in order: braces as in `{000..591}`, and globs of local files.

    Args:
        directory: where relative paths begin; the working directory by default.

    Raises: DataError when a glob finds nothing, a pattern is a command, or a name comes twice.
    """
    from braceexpand import braceexpand

    names: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        checked(pattern)
        try:
            expanded = braceexpand(pattern, escape=False) if "{" in pattern else [pattern]
            for name in expanded:
                names += _found(checked(name), directory)
                if len(names) > _MAX_NAMES:
                    raise DataError(f"{pattern} stands for more than {_MAX_NAMES:,} names")
        except ValueError as error:
            raise DataError(f"{pattern}: its braces do not pair") from error
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"{twice} is named twice; each shard may come once in a list")
    return names


def _found(name: str, directory: Path | None) -> list[str]:
    if not is_local(name):
        if _GLOB.search(name.partition("?")[0]):
            raise DataError(
                f"{name}: globs work for local files only; write the numbers as braces, such as train-{{000000..000591}}.tar"
            )
        return [name]
    path = local_path(name)
    path = directory / path if directory is not None else path
    if not _GLOB.search(str(path)) or path.exists():
        return [str(path)]
    found = sorted(glob.glob(str(path)))
    if not found:
        raise DataError(f"{name}: no file has such a name")
    return found
