"""Captions as people keep them - JSONL, CSV, TSV, text files beside the pictures - and what is wrong with them."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_t2i.errors import DataError

MAX_CHARACTERS = 1_000
"""Longer captions are cut at the last word that fits, and listed."""
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file")
_MAX_LINES = 50
"""A field of a CSV file that spans more lines than this lacks its closing quotation mark."""
CAPTION_COLUMNS = ("captions", "caption", "text", "description")


@dataclass(frozen=True)
class Row:
    """One line of a caption file: a picture and its captions, or, if `problem` says why, neither."""

    where: str
    image: str = ""
    captions: tuple[str, ...] = ()
    problem: str = ""


def clean(caption: str) -> tuple[str, str]:
    """The caption (NFC, one line, no control characters, not too long) and what was wrong with it, or "".

    The caption is "" when it cannot be used.
    """
    if caption.isascii() and caption.isprintable():  # the usual caption, twenty times faster
        text = " ".join(caption.split())
        if text and len(text) <= MAX_CHARACTERS:
            return text, ""
    if any("\ud800" <= char <= "\udfff" for char in caption):
        return "", "caption is not UTF-8"
    visible = (char if unicodedata.category(char)[0] != "C" or char == "\u200d" else " " for char in caption)
    text = " ".join(unicodedata.normalize("NFC", "".join(visible)).split())
    if not text:
        return "", "caption is empty"
    if len(text) > MAX_CHARACTERS:
        return text[: MAX_CHARACTERS + 1].rpartition(" ")[0] or text[:MAX_CHARACTERS], "caption is too long, cut"
    return text, ""


def decode_text(data: bytes) -> str:
    """UTF-8 (or UTF-16, if marked) as text without a byte order mark; bytes that are neither become lone surrogates."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


@dataclass(frozen=True)
class Columns:
    """Names under which a table keeps its pictures and captions; the first that a row has counts."""

    image: tuple[str, ...] = IMAGE_COLUMNS
    caption: tuple[str, ...] = CAPTION_COLUMNS

    def __str__(self) -> str:
        caption = "caption" if "caption" in self.caption else self.caption[0]
        return f"`{self.image[0]}` and `{caption}`"


def read_captions(path: Path) -> Iterator[Row]:
    """The rows of a caption file. Raises DataError when it cannot be read, or has no columns we know."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the captions {path}: {error.strerror}") from error
    suffix = path.suffix.lower()
    form = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}.get(suffix)
    if form is None:
        raise DataError(f"{path}: captions must be a .jsonl, .csv or .tsv file")
    return rows_of(data, form, str(path))


def rows_of(data: bytes, form: str, name: str, columns: Columns = Columns()) -> Iterator[Row]:
    """The rows of a table's bytes, given its form: jsonl, csv or tsv. Raises DataError when its columns are unknown."""
    text = decode_text(data)
    if form == "jsonl":
        return _read_json_lines(text, name, columns)
    return _read_table(text, name, "\t" if form == "tsv" else ",", columns)


def read_text_file(path: Path) -> tuple[str, ...]:
    """The captions beside a picture, one a line. Raises OSError."""
    return tuple(line for line in decode_text(path.read_bytes()).splitlines() if line.strip())


def _named(row: dict, names: tuple[str, ...]) -> object:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _read_json_lines(text: str, name: str, columns: Columns) -> Iterator[Row]:
    short = Path(name).name
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{short}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield Row(where, problem="line is not JSON")
            continue
        image = _named(row, columns.image) if isinstance(row, dict) else None
        captions = _named(row, columns.caption) if isinstance(row, dict) else None
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(image, str):
            yield Row(where, problem=f'line has no "{columns.image[0]}"')
        elif not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            yield Row(
                where, image, ("",) if captions is None else (), "" if captions is None else "captions are no text"
            )
        else:
            yield Row(where, image, tuple(captions))


def _read_table(text: str, name: str, delimiter: str, columns: Columns) -> Iterator[Row]:
    short = Path(name).name
    lines = (line + "\n" for line in text.replace("\0", "").split("\n"))
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)
    try:
        header = [name.strip().lower() for name in next(reader)]
        image = next(header.index(column.lower()) for column in columns.image if column.lower() in header)
        caption = next(header.index(column.lower()) for column in columns.caption if column.lower() in header)
    except (StopIteration, csv.Error) as error:
        first = text.split("\n", 1)[0][:100].encode("utf-8", "replace").decode()
        raise DataError(f"{name}: the first line must name the columns {columns}; it is: {first!r}") from error
    line = 0
    while True:
        line, row, problem = reader.line_num, None, ""
        try:
            row = next(reader, None)
        except csv.Error:
            problem = "line is not CSV"
        where = f"{short}:{line + 1}"
        if row is None and not problem:
            return
        if reader.line_num - line > _MAX_LINES:
            where, problem = f"{where}-{reader.line_num}", "quotation mark is never closed"
        elif row is not None and len(row) <= max(image, caption) and any(field.strip() for field in row):
            problem = "line has too few columns"
        if problem:
            yield Row(where, problem=problem)
        elif row and any(field.strip() for field in row):
            yield Row(where, _unquoted(row[image]).strip(), (_unquoted(row[caption]),))


def _unquoted(field: str) -> str:
    """TSV is read without quotation marks, yet some programs write them."""
    field = field.rstrip("\r\n")
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field
