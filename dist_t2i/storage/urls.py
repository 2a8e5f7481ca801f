"""Names of data: paths, `file://...` and URLs of object stores. Names with braces or globs expand to several names.

Names come from a configuration and must never run commands. Therefore names such as `pipe:...`, which webdataset would
run in a shell, are refused.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dist_t2i.errors import DataError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_COMMANDS = ("pipe:", "|", "exec:", "shell:", "cmd:", "gopen:")
_GLOB = re.compile(r"[*?\[]")
_MAX_NAMES = 10_000_000


def scheme_of(url: str) -> str:
    """The scheme of a URL in lower case: `s3` for `s3://bucket/key`, "" for a path."""
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else ""


def is_local(url: str) -> bool:
    return scheme_of(url) in ("", "file")


def checked(url: str) -> str:
    """Returns the URL unchanged. Raises DataError if the URL, or a URL chained to it with `::`, is a command."""
    for part in url.split("::"):
        if part.strip().lower().startswith(_COMMANDS):
            raise DataError(f"{url}: commands are not run; name a file, a folder or a URL")
    return url


def unchained(url: str) -> str:
    """Returns the URL unchanged. Raises DataError if the URL is a command or chains file systems with `::`."""
    if "::" in checked(url) and "://" in url:
        raise DataError(f"{url}: file systems cannot be chained with `::`; give one URL")
    return url


def local_path(url: str) -> Path:
    """The local path of `url`, which is a plain path or a `file://` URL. Raises DataError for other URLs."""
    scheme = scheme_of(checked(url))
    if scheme == "file":
        return Path(url[len("file://") :])
    if scheme:
        raise DataError(f"{url}: a local folder is needed here, not {scheme}://")
    return Path(url)


def absolute(url: str) -> str:
    """The absolute form of a local path. A URL of an object store is returned unchanged."""
    return os.path.abspath(local_path(url)) if is_local(url) else url


def join(base: str, name: str) -> str:
    """The path or URL of `name` in the folder `base`; `name` itself if `name` is a URL or an absolute path."""
    if scheme_of(name) or os.path.isabs(name):
        return checked(name)
    if is_local(base):
        return str(local_path(base) / name)
    address, question, query = base.partition("?")
    return f"{address.rstrip('/')}/{name}{question}{query}"


def parent(url: str) -> str:
    """The path or URL of the folder that contains a file."""
    if is_local(url):
        return str(local_path(url).parent)
    return url.partition("?")[0].rpartition("/")[0]


def base_name(url: str) -> str:
    """The last component of a name, without the query of a URL."""
    return posixpath.basename(url.partition("?")[0] if scheme_of(url) else url.replace(os.sep, "/"))


def with_suffix(url: str, suffix: str) -> str:
    """The path or URL with another suffix: `a/b.tar` becomes `a/b.index`."""
    if is_local(url):
        return str(local_path(url).with_suffix(suffix))
    address, question, query = url.partition("?")
    return f"{posixpath.splitext(address)[0]}{suffix}{question}{query}"


def expand(patterns: str | Sequence[str], directory: Path | None = None) -> list[str]:
    """The names to which patterns expand, in order. Braces such as `{000..591}` expand to all combinations, and globs
    expand to the matching local files. If `directory` is given, relative paths start from `directory`.

    Raises DataError if a glob matches no file, braces are unbalanced, a pattern is a command, or a name occurs twice.
    """
    from braceexpand import braceexpand

    names: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        checked(pattern)
        try:
            expanded = braceexpand(pattern, escape=False) if "{" in pattern else [pattern]
            for name in expanded:
                names += _matches(checked(name), directory)
                if len(names) > _MAX_NAMES:
                    raise DataError(f"{pattern} expands to more than {_MAX_NAMES:,} names")
        except ValueError as error:
            raise DataError(f"{pattern}: the braces do not match") from error
    if len(set(names)) < len(names):
        duplicate = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{duplicate} is named twice; list each shard once")
    return names


def _matches(name: str, directory: Path | None) -> list[str]:
    if not is_local(name):
        if _GLOB.search(name.partition("?")[0]):
            raise DataError(
                f"{name}: globs match only local files; write numbers in braces, such as train-{{000000..000591}}.tar"
            )
        return [name]
    path = local_path(name)
    path = directory / path if directory is not None else path
    if not _GLOB.search(str(path)) or path.exists():
        return [str(path)]
    names = sorted(glob.glob(str(path)))
    if not names:
        raise DataError(f"{name}: no file matches")
    return names
