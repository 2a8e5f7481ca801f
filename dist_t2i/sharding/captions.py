"""Reads and cleans captions in JSONL, CSV, TSV and text files, and gives a reason for each unusable caption."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError

MAX_CHARACTERS = 1_000
"""A longer caption is truncated after the last word that fits, and is listed as a problem."""
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file")
CAPTION_COLUMNS = ("captions", "caption", "text", "description")
Columns = tuple[tuple[str, ...], tuple[str, ...]]
"""Possible names of a table's picture column and of its caption column. The first existing name is used."""
_MAX_LINES = 50
"""If a row of a CSV file spans more lines than this, a closing quotation mark is assumed to be missing."""
_FORMS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}


@dataclass(frozen=True)
class Row:
    """One line of a caption file: either a picture and its captions, or the `problem` that makes the line unusable."""

    where: str
    image: str = ""
    captions: tuple[str, ...] = ()
    problem: str = ""


def make_row(where: str, image: Any, captions: Any, no_image: str) -> Row:
    """The row of a line whose fields may have any type. The row's problem is `no_image` if `image` is not a string."""
    if not isinstance(image, str):
        return Row(where, problem=no_image)
    texts = text_list([""] if captions is None else captions)
    return Row(where, problem="captions are no text") if texts is None else Row(where, image, tuple(texts))


def text_list(captions: Any) -> list[str] | None:
    """Converts a string or a list of strings to a list of strings; returns None for any other type."""
    if isinstance(captions, str):
        return [captions]
    return captions if isinstance(captions, list) and all(isinstance(text, str) for text in captions) else None


def clean(caption: str) -> tuple[str, str]:
    """Returns the cleaned caption, or "" if it cannot be used, and its problem, or "" if it has none.

    A cleaned caption is NFC, one line without control characters, and at most `MAX_CHARACTERS` long.
    """
    if not (caption.isascii() and caption.isprintable()):  # for other captions, skipping this is twenty times faster
        if any("\ud800" <= char <= "\udfff" for char in caption):
            return "", "caption is not UTF-8"
        visible = (char if unicodedata.category(char)[0] != "C" or char == "\u200d" else " " for char in caption)
        caption = unicodedata.normalize("NFC", "".join(visible))
    text = " ".join(caption.split())
    if not text:
        return "", "caption is empty"
    if len(text) > MAX_CHARACTERS:
        return text[: MAX_CHARACTERS + 1].rpartition(" ")[0] or text[:MAX_CHARACTERS], "caption is too long, cut"
    return text, ""


def decode_text(data: bytes) -> str:
    """Decodes UTF-8, or UTF-16 if the data begins with its byte order mark. The result has no byte order mark. Bytes
    that are not UTF-8 become lone surrogates."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


def read_captions(path: Path) -> Iterator[Row]:
    """The rows of a caption file. Raises DataError if the file cannot be read or its columns are unknown."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the captions {path}: {error.strerror}") from error
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise DataError(f"{path}: captions must be a .jsonl, .csv or .tsv file")
    return rows_of(data, form, str(path))


def rows_of(data: bytes, form: str, name: str, columns: Columns = (IMAGE_COLUMNS, CAPTION_COLUMNS)) -> Iterator[Row]:
    """The rows of the table with the bytes `data`; `form` is jsonl, csv or tsv. Raises DataError for unknown
    columns."""
    text = decode_text(data)
    return _read_json_lines(text, name, columns) if form == "jsonl" else _read_table(text, form, name, columns)


def read_text_file(path: Path) -> tuple[str, ...]:
    """The captions in a text file that has one caption per line. Raises OSError if the file cannot be read."""
    return tuple(line for line in decode_text(path.read_bytes()).splitlines() if line.strip())


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
        fields = row if isinstance(row, dict) else {}
        image, captions = (
            next((fields[name] for name in names if fields.get(name) not in (None, "")), None) for names in columns
        )
        yield make_row(where, image, captions, f'line has no "{columns[0][0]}"')


def _read_table(text: str, form: str, name: str, columns: Columns) -> Iterator[Row]:
    short = Path(name).name
    lines = (line + "\n" for line in text.replace("\0", "").split("\n"))
    reader = csv.reader(lines, "excel-tab", quoting=csv.QUOTE_NONE) if form == "tsv" else csv.reader(lines)
    try:
        header = [name.strip().lower() for name in next(reader)]
        image, caption = [
            next(header.index(name.lower()) for name in names if name.lower() in header) for names in columns
        ]
    except (StopIteration, csv.Error) as error:
        first = text.split("\n", 1)[0][:100].encode("utf-8", "replace").decode()
        usual = f"`{columns[0][0]}` and `{'caption' if 'caption' in columns[1] else columns[1][0]}`"
        raise DataError(f"{name}: the first line must name the columns {usual}; it is: {first!r}") from error
    while True:
        before, filled, problem = reader.line_num, False, ""
        try:
            row = next(reader)
            filled = any(field.strip() for field in row)
        except StopIteration:
            return
        except csv.Error:
            problem = "line is not CSV"
        where = f"{short}:{before + 1}"
        if reader.line_num - before > _MAX_LINES:
            where, problem = f"{where}-{reader.line_num}", "quotation mark is never closed"
        elif filled and len(row) <= max(image, caption):
            problem = "line has too few columns"
        if problem:
            yield Row(where, problem=problem)
        elif filled:
            yield Row(where, _unquoted(row[image]).strip(), (_unquoted(row[caption]),))


def _unquoted(field: str) -> str:
    """Removes the quotation marks that some programs write around a field of a TSV file."""
    field = field.rstrip("\r\n")
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field
