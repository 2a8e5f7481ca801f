"""Tables of pictures and captions, as img2dataset and others keep them: JSONL, CSV, TSV, Parquet; paths or URLs."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns, Row, rows_of
from dist_t2i.sharding.items import Item, Problem, captioned, hold_out
from dist_t2i.sharding.pictures import Download, Origin, PictureFile, reachable
from dist_t2i.storage.folders import open_folder

DEFAULT = Columns(("url", *IMAGE_COLUMNS), CAPTION_COLUMNS)
_BATCH = 10_000


def table_items(
    form: str, tables: Sequence[str], images: str, columns: Columns, holdout: float
) -> tuple[list[Item], list[Problem]]:
    """The pictures of one or several tables, each once with all its captions, sorted by key.

    A path is relative to `images`, or in its absence to the folder of its table; a URL is taken as it is.

    Raises: DataError when a table cannot be read, or has no columns of these names.
    """
    problems: list[Problem] = []
    said: dict[Origin, tuple[str, str, list[str]]] = {}
    for table in tables:
        folder, _, name = table.rpartition("/")
        missing: dict[str, bool] = {}
        for row in _rows(form, folder, name, table, columns):
            if row.problem:
                problems.append(Problem(row.where, "", row.problem))
                continue
            picture, problem = _picture(row.image, images or folder, missing)
            if picture is None:
                problems.append(Problem(row.where, row.image.encode("utf-8", "backslashreplace").decode(), problem))
                continue
            said.setdefault(picture, (row.image, row.where, []))[2].extend(row.captions)
    items: dict[str, Item] = {}
    for picture, (image, where, texts) in said.items():
        key = _key(image, items)
        item = captioned(key, picture, texts, where, problems, **({"url": image} if picture.remote else {}))
        if item:
            items[key] = item
    found = [items[key] for key in sorted(items)]
    hold_out(found, holdout)
    return found, problems


def _rows(form: str, folder: str, name: str, table: str, columns: Columns) -> Iterator[Row]:
    try:
        data = open_folder(folder or ("/" if table.startswith("/") else ".")).read(name)
    except OSError as error:
        raise DataError(f"cannot read the table {table}: {error.strerror or error}") from error
    return _parquet_rows(data, table, columns) if form == "parquet" else rows_of(data, form, table, columns)


def _parquet_rows(data: bytes, table: str, columns: Columns) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("Parquet tables need pyarrow: pip install 'dist_t2i[parquet]'") from error
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        chosen = [next((one for one in wanted if one in names), "") for wanted in (columns.image, columns.caption)]
        for wanted, one in zip(("--image-column", "--caption-column"), chosen, strict=True):
            if not one:
                raise DataError(f"{table}: name the right column with {wanted}; it has {', '.join(names)}")
        number = 0
        for batch in file.iter_batches(_BATCH, columns=chosen):
            for image, caption in zip(*(batch.column(one).to_pylist() for one in chosen), strict=True):
                yield _row(f"{Path(table).name}:{number}", image, caption)
                number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{table}: cannot be read as Parquet: {error}") from error


def _row(where: str, image: Any, caption: Any) -> Row:
    captions = [caption] if isinstance(caption, str) else caption
    if not isinstance(image, str):
        return Row(where, problem="row has no picture")
    if captions is None:
        return Row(where, image, ("",))
    if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
        return Row(where, image, problem="captions are no text")
    return Row(where, image, tuple(captions))


def _picture(image: str, base: str, missing: dict[str, bool]) -> tuple[Origin | None, str]:
    """The origin of a picture that a table names, or None and why there is none."""
    if not image or "\0" in image or len(image) > 4096 or any("\ud800" <= char <= "\udfff" for char in image):
        return None, "picture is missing"
    for url in (image, base):
        if "://" in url or re.match(r"\s*(pipe:|\|)", url):
            break
    else:
        path = os.path.normpath(os.path.join(base, image))
        if path not in missing:
            missing[path] = not os.path.isfile(path)
        return (None, "picture is missing") if missing[path] else (PictureFile(path), "")
    try:
        url = image if url == image else f"{base.rstrip('/')}/{image.removeprefix('./')}"
        if url.startswith("file://"):
            return _picture(url.removeprefix("file://"), "", missing)
        return (Download(url), "") if reachable(url) else (None, "URLs of this kind are not read")
    except DataError:
        return None, "URLs of this kind are not read"


def _key(image: str, taken: dict[str, Item]) -> str:
    """A key that depends on the path or URL; the last parts of it where they are unique, as far as one knows so far."""
    path = PurePosixPath(urlsplit(image).path if "://" in image else image)
    parts = [part for part in path.with_suffix("").parts if part not in ("..", "/", ".")] if path.name else []
    key = re.sub(r"[^\w/ -]", "_", "/".join(parts[-2:] if "://" in image else parts))[-150:].strip("/ ")
    if not key or key in taken:
        key = f"{key or 'picture'}_{hashlib.sha256(image.encode()).hexdigest()[:12]}"
    return key
