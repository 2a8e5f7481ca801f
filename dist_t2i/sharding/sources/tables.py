"""Reads JSONL, CSV, TSV or Parquet tables of pictures (paths or URLs) and captions, as img2dataset does."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns, Row, make_row, rows_of
from dist_t2i.sharding.items import Gathered, Item, Problem, captioned, hold_out
from dist_t2i.sharding.pictures import Picture, PictureFile, PictureUrl
from dist_t2i.storage.clients import OBJECT_STORES
from dist_t2i.storage.folders import open_folder
from dist_t2i.storage.urls import expand, scheme_of, unchained

_BATCH = 10_000
_SCHEMES = (*OBJECT_STORES, "memory", "local", "sftp", "hdfs")


def table_items(
    form: str, patterns: Sequence[str], images: str, image_column: str, caption_column: str, holdout: float
) -> Gathered:
    """The pictures that tables list, sorted by key. A repeated picture is returned once with all its captions.

    `patterns` are the paths or URLs of the tables, which may contain braces. `form` is `jsonl`, `csv`, `tsv` or
    `parquet`. Paths of pictures are relative to the folder `images`, or to the folder of the table if `images` is "".
    If `image_column` or `caption_column` is "", the usual names of this column are tried. Raises DataError if a table
    or its columns cannot be read.
    """
    image_columns = (image_column,) if image_column else ("url", *IMAGE_COLUMNS)
    columns = image_columns, (caption_column,) if caption_column else CAPTION_COLUMNS
    problems: list[Problem] = []
    rows_by_picture: dict[Picture, tuple[str, str, list[str]]] = {}
    tables = [table for pattern in patterns for table in expand(unchained(pattern))]
    for table in tables:
        folder, _, name = table.rpartition("/")
        try:
            data = open_folder(folder or ("/" if table.startswith("/") else ".")).read(name)
        except OSError as error:
            raise DataError(f"cannot read the table {table}: {error.strerror or error}") from error
        missing: dict[str, bool] = {}
        for row in _parquet_rows(data, table, columns) if form == "parquet" else rows_of(data, form, table, columns):
            picture, problem = _picture(row.image, images or folder, missing)
            if picture:
                rows_by_picture.setdefault(picture, (row.image, row.where, []))[2].extend(row.captions)
            else:
                name = row.image.encode("utf-8", "backslashreplace").decode()
                problems.append(Problem(row.where, name, row.problem or problem))
    items: dict[str, Item] = {}
    for picture, (image, where, texts) in rows_by_picture.items():
        found = Item(_key(image, items), picture, texts, attributes={"url": image} if picture.remote else {})
        items |= {item.key: item for item in captioned(found, where, problems)}
    ordered = [items[key] for key in sorted(items)]
    hold_out(ordered, holdout)
    return ordered, problems, {"name": tables[0].rpartition("/")[2]}


def _parquet_rows(data: bytes, table: str, columns: Columns) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("Parquet tables need pyarrow: pip install 'dist_t2i[parquet]'") from error
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        existing = file.schema_arrow.names
        names = [next((name for name in known if name in existing), "") for known in columns]
        if not all(names):
            option = "--caption-column" if names[0] else "--image-column"
            raise DataError(f"{table}: select a column with {option}; the table has {', '.join(existing)}")
        numbers = itertools.count()
        for batch in file.iter_batches(_BATCH, columns=names):
            for image, captions in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                yield make_row(f"{Path(table).name}:{next(numbers)}", image, captions, "row has no picture")
    except pyarrow.ArrowException as error:
        raise DataError(f"{table}: cannot be read as Parquet: {error}") from error


def _picture(image: str, base: str, missing: dict[str, bool]) -> tuple[Picture | None, str]:
    """The picture `image`, or None and the reason for rejecting `image`. `missing` caches which files do not exist."""
    if not image or "\0" in image or len(image) > 4096 or any("\ud800" <= char <= "\udfff" for char in image):
        return None, "picture is missing"
    url = next((name for name in (image, base) if "://" in name or re.match(r"\s*(pipe:|\|)", name)), "")
    if not url:
        path = os.path.normpath(os.path.join(base, image))
        if path not in missing:
            missing[path] = not os.path.isfile(path)
        return (None, "picture is missing") if missing[path] else (PictureFile(path), "")
    with contextlib.suppress(DataError):  # `unchained` refuses commands and chained file systems
        url = image if url == image else f"{base.rstrip('/')}/{image.removeprefix('./')}"
        if url.startswith("file://"):
            return _picture(url.removeprefix("file://"), "", missing)
        if scheme_of(unchained(url)) in _SCHEMES:
            return PictureUrl(url), ""
    return None, "URLs of this kind are not supported"


def _key(image: str, existing: dict[str, Item]) -> str:
    """A unique key, made from the path of the picture or from the last two parts of its URL. If this key exists
    already, a hash of the whole path or URL is appended."""
    path = PurePosixPath(urlsplit(image).path if "://" in image else image)
    parts = [part for part in path.with_suffix("").parts if part not in ("..", "/", ".")] if path.name else []
    key = re.sub(r"[^\w/ -]", "_", "/".join(parts[-2:] if "://" in image else parts))[-150:].strip("/ ")
    if not key or key in existing:
        key = f"{key or 'picture'}_{hashlib.sha256(image.encode()).hexdigest()[:12]}"
    return key
