"""One page about a set: counts, statistics of the captions, a sheet of pictures, what was left out and why."""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from dist_t2i.data.shard_index import ShardIndex
from dist_t2i.data.shard_set import BadSample, Sample
from dist_t2i.sharding.writing.shard_writer import count_reasons
from dist_t2i.storage.folders import Folder, locate

_SHEET, _COLUMNS, _TILE = 48, 12, 96
_MAX_LISTED = 200


def write_report(place: Folder, manifest: dict[str, Any], problems: Sequence[dict[str, Any]]) -> None:
    """Write report.html and contact_sheet.png beside the shards; the same bytes for the same set. Raises OSError."""
    samples = some_samples(place, manifest)
    place.write("contact_sheet.png", contact_sheet(samples))
    place.write("report.html", _page(manifest, samples, problems).encode("utf-8", "backslashreplace"))


def some_samples(place: Folder, manifest: dict[str, Any], split: str = "train", count: int = _SHEET) -> list[Sample]:
    """Some samples of a split, evenly spread; those that cannot be read are left out. Raises OSError, DataError."""
    shards = manifest["splits"][split]["shards"]
    total = sum(shard["samples"] for shard in shards)
    count = min(count, total)
    wanted = [place * total // count for place in range(count)]
    chosen, start = [], 0
    for shard in shards:
        rows = [number - start for number in wanted if start <= number < start + shard["samples"]]
        start += shard["samples"]
        if rows:
            index = ShardIndex.from_bytes(place.read(index_name(shard)), shard["name"])
            chosen.extend(_samples_of(*locate(place, shard["name"]), index, rows))
    return chosen


def index_name(shard: dict[str, Any]) -> str:
    """The index of a shard in a manifest: beside it unless said otherwise."""
    return shard.get("index") or f"{shard['name'][:-4]}.index"


def _samples_of(place: Folder, name: str, index: ShardIndex, rows: Sequence[int]) -> list[Sample]:
    found = []
    for row in rows:
        raw: dict[str, Any] = {"__key__": index.keys[row], "__url__": place.file_url(name)}
        for member in index.members(row):
            raw[member.extension] = place.read_range(name, member.offset, member.size)
        with contextlib.suppress(BadSample):
            found.append(Sample(raw))
    return found


def contact_sheet(samples: Sequence[Sample]) -> bytes:
    """A PNG with the pictures in rows of twelve."""
    from PIL import Image, ImageOps

    rows = max(1, -(-len(samples) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * _TILE), "white")
    for place, sample in enumerate(samples):
        try:
            tile = ImageOps.fit(sample.image, (_TILE, _TILE))
        except ValueError:  # it looked whole and does not decode
            continue
        sheet.paste(tile, (place % _COLUMNS * _TILE, place // _COLUMNS * _TILE))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>\n"

    return f"<table>\n{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>\n"


def _split_table(splits: Mapping[str, Any]) -> str:
    head = ["split", "pictures", "shards", "MB", "short side, pixels", "captions", "words a caption"]
    head += ["tokens a caption, mean / max", "distinct words", "words that train lacks"]
    rows = [
        (
            split,
            f"{part['samples']:,}",
            len(part["shards"]),
            f"{part['bytes'] / 1e6:,.1f}",
            f"{part['short_side'][0]} to {part['short_side'][1]}",
            f"{part['captions']['count']:,}",
            part["captions"]["words"]["mean"],
            f"{part['captions']['tokens']['mean']} / {part['captions']['tokens']['max']}",
            f"{part['captions']['distinct_words']:,}",
            part["captions"]["words_not_in_train"],
        )
        for split, part in splits.items()
    ]
    return _table(head, rows)


def _problem_tables(problems: Sequence[dict[str, Any]]) -> str:
    """How often each reason came, and the first problems one by one."""
    if not problems:
        return "<p>Nothing.</p>"
    listed = [(p["where"], p["picture"], p["reason"]) for p in problems[:_MAX_LISTED]]
    tables = f"{_table(('reason', 'count'), count_reasons(problems).most_common())}<h3>Which</h3>"
    tables += _table(("where", "picture", "reason"), listed)
    more = len(problems) - _MAX_LISTED
    return tables + (f"<p>{more:,} more are in bad_samples.jsonl.</p>" if more > 0 else "")


def _shard_table(splits: Mapping[str, Any]) -> str:
    head = ("shard", "pictures", "MB", "captions", "short side, pixels", "left out", "sha256 begins")
    rows = [
        (
            shard["name"],
            f"{shard['samples']:,}",
            f"{shard['bytes'] / 1e6:,.1f}",
            f"{shard['captions']:,}",
            f"{shard['short_side'][0]} to {shard['short_side'][1]}",
            shard["left_out"],
            shard["sha256"][:16],
        )
        for part in splits.values()
        for shard in part["shards"]
    ]
    more = len(rows) - _MAX_LISTED
    return _table(head, rows[:_MAX_LISTED]) + (f"<p>and {more:,} more.</p>" if more > 0 else "")


def _page(manifest: dict[str, Any], samples: Sequence[Sample], problems: Sequence[dict[str, Any]]) -> str:
    name = html.escape(str(manifest.get("name", "A set of captioned pictures")))
    captions = [(place + 1, sample.key, " | ".join(sample.captions)) for place, sample in enumerate(samples)]
    credit = "".join(f"<p>{html.escape(str(manifest[k]))}</p>" for k in ("credit", "licence") if manifest.get(k))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1180px;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{border:1px solid #ccc;padding:.2em .6em;text-align:left;
overflow-wrap:anywhere}}img{{max-width:100%;border:1px solid #ccc}}code{{overflow-wrap:anywhere}}</style>
<h1>{name}</h1>{credit}
<p>Fingerprint <code>{manifest["fingerprint"]}</code>; tokenizer of {manifest["tokenizer"]["vocabulary"]:,} tokens,
{manifest["tokenizer"]["known_words"]:,} known words.</p>
{_split_table(manifest["splits"])}
<h2>Pictures</h2><img src="contact_sheet.png" alt="Pictures of the training split">
<h2>Their captions</h2>{_table(("", "key", "captions"), captions)}
<h2>Left out or changed</h2>{_problem_tables(problems)}
<h2>Shards</h2>{_shard_table(manifest["splits"])}
</html>
"""
