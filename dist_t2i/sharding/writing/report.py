"""The report page of a set: counts, statistics of the captions, a sheet of pictures, and reasons for omissions."""

from __future__ import annotations

import contextlib
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dist_t2i.data.shard_index import ShardIndex
from dist_t2i.data.shard_set import BadSample, Sample
from dist_t2i.storage.folders import Folder, locate

_SHEET, _COLUMNS, _TILE = 48, 12, 96
_MAX_LISTED = 200


def write_report(folder: Folder, manifest: dict[str, Any], problems: Sequence[dict[str, Any]]) -> None:
    """Writes report.html and contact_sheet.png, whose bytes depend only on the set. Raises OSError."""
    samples = some_samples(folder, manifest)
    folder.write("contact_sheet.png", contact_sheet(samples))
    folder.write("report.html", _page(manifest, samples, problems).encode("utf-8", "backslashreplace"))


def some_samples(folder: Folder, manifest: dict[str, Any], split: str = "train", count: int = _SHEET) -> list[Sample]:
    """Up to `count` evenly spaced samples of a split, without unusable samples. Raises OSError, DataError."""
    shards = manifest["splits"][split]["shards"]
    total = sum(shard["samples"] for shard in shards)
    count = min(count, total)
    wanted = [number * total // count for number in range(count)]
    samples, start = [], 0
    for shard in shards:
        rows = [number - start for number in wanted if start <= number < start + shard["samples"]]
        start += shard["samples"]
        if not rows:
            continue
        index = ShardIndex.from_bytes(folder.read(index_name(shard)), shard["name"])
        tars, name = locate(folder, shard["name"])
        for row in rows:
            raw: dict[str, Any] = {"__key__": index.keys[row], "__url__": tars.file_url(name)}
            for member in index.members(row):
                raw[member.extension] = tars.read_range(name, member.offset, member.size)
            with contextlib.suppress(BadSample):
                samples.append(Sample(raw))
    return samples


def index_name(shard: dict[str, Any]) -> str:
    """The name of a shard's index file in a manifest: by default, the name of the tar with the suffix .index."""
    return shard.get("index") or f"{shard['name'][:-4]}.index"


def contact_sheet(samples: Sequence[Sample]) -> bytes:
    """A PNG that shows the pictures in rows of twelve."""
    from PIL import Image, ImageOps

    sheet = Image.new("RGB", (_COLUMNS * _TILE, max(1, -(-len(samples) // _COLUMNS)) * _TILE), "white")
    for number, sample in enumerate(samples):
        with contextlib.suppress(ValueError):  # the tile of a picture that does not decode stays white
            tile = ImageOps.fit(sample.image, (_TILE, _TILE))
            sheet.paste(tile, (number % _COLUMNS * _TILE, number // _COLUMNS * _TILE))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], rest: str = "") -> str:
    """An HTML table of the first rows, and a line with the number of further rows and their location, `rest`."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>\n"

    more = f"<p>and {len(rows) - _MAX_LISTED:,} more{rest}.</p>" if len(rows) > _MAX_LISTED else ""
    return f"<table>\n{line(head, 'th')}{''.join(line(row, 'td') for row in rows[:_MAX_LISTED])}</table>\n{more}"


def split_table(splits: Mapping[str, Any]) -> tuple[list[str], list[list]]:
    """The head and the rows of a table with the counts and statistics of each split."""
    head = ["split", "pictures", "shards", "MB", "KB each", "short side, pixels", "captions", "words, mean / max"]
    head += ["tokens, mean / 99% / max", "distinct words", "words missing from train"]
    rows = []
    for name, part in splits.items():
        captions, size, sides = part["captions"], part["bytes"], part.get("short_side") or ["unknown"]
        words, tokens = captions["words"], captions["tokens"]
        row = [name, f"{part['samples']:,}", len(part["shards"]), f"{size / 1e6:,.1f}"]
        row += [f"{size / max(1, part['samples']) / 1e3:,.1f}", " to ".join(map(str, sides))]
        row += [f"{captions['count']:,}", f"{words['mean']} / {words['max']}"]
        row += [f"{tokens['mean']} / {tokens['p99']} / {tokens['max']}", f"{captions['distinct_words']:,}"]
        rows.append([*row, captions["words_not_in_train"]])
    return head, rows


def _shard_table(splits: Mapping[str, Any]) -> str:
    head = ("shard", "pictures", "MB", "captions", "short side, pixels", "left out", "start of its SHA-256")
    rows = []
    for shard in (shard for part in splits.values() for shard in part["shards"]):
        row = [shard["name"], f"{shard['samples']:,}", f"{shard['bytes'] / 1e6:,.1f}", f"{shard['captions']:,}"]
        rows.append([*row, " to ".join(map(str, shard["short_side"])), shard["left_out"], shard["sha256"][:16]])
    return _table(head, rows)


def _page(manifest: dict[str, Any], samples: Sequence[Sample], problems: Sequence[dict[str, Any]]) -> str:
    name = html.escape(str(manifest.get("name", "A set of captioned pictures")))
    captions = [(number, sample.key, " | ".join(sample.captions)) for number, sample in enumerate(samples, 1)]
    counts, head = Counter(problem["reason"] for problem in problems), ("where", "picture", "reason")
    details = _table(head, [[problem[cell] for cell in head] for problem in problems], " in bad_samples.jsonl")
    listed = f"{_table(('reason', 'count'), counts.most_common())}<h3>Details</h3>{details}"
    credit = "".join(f"<p>{html.escape(str(manifest[k]))}</p>" for k in ("credit", "licence") if manifest.get(k))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1180px;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{border:1px solid #ccc;padding:.2em .6em;text-align:left;
overflow-wrap:anywhere}}img{{max-width:100%;border:1px solid #ccc}}code{{overflow-wrap:anywhere}}</style>
<h1>{name}</h1>{credit}
<p>Fingerprint <code>{manifest["fingerprint"]}</code>; tokenizer of {manifest["tokenizer"]["vocabulary"]:,} tokens,
{manifest["tokenizer"]["known_words"]:,} known words.</p>
{_table(*split_table(manifest["splits"]))}
<h2>Pictures</h2><img src="contact_sheet.png" alt="Pictures of the training split">
<h2>Captions of these pictures</h2>{_table(("", "key", "captions"), captions)}
<h2>Left out or changed</h2>{listed if problems else "<p>Nothing.</p>"}
<h2>Shards</h2>{_shard_table(manifest["splits"])}
</html>
"""
