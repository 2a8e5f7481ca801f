"""What makes shards a set: numbers without gaps, tokenizer, statistics, report, and last of all the manifest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dist_t2i.data.manifest import FORMAT, VERSION, caption_statistics, manifest_bytes, problem_lines, tokenizer_entry
from dist_t2i.data.tokenizer import Tokenizer, train_tokenizer
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.report import write_report
from dist_t2i.sharding.writing.shard_writer import Planned, accepted, count_reasons
from dist_t2i.storage.folders import WORK, Folder

SHARD_FACTS = ("samples", "bytes", "sha256", "index_sha256", "captions")


def finish(
    place: Folder,
    planned: Sequence[Planned],
    results: Sequence[dict[str, Any]],
    problems: list[dict[str, Any]],
    options: Options,
) -> dict[str, Any]:
    """Number the shards without gaps, then write everything that is not a shard; the manifest last. Raises OSError."""
    place.remove("manifest.json")
    kept = {split: accepted(planned, results, split) for split in dict.fromkeys(shard.split for shard in planned)}
    counts = Counter(caption for item in kept["train"] for caption in item.captions)
    tokenizer = train_tokenizer(counts, options.vocabulary)
    place.write("tokenizer.json", tokenizer.text.encode())
    shards = _number(place, results)
    splits = {
        split: {
            "samples": sum(shard["samples"] for shard in shards[split]),
            "bytes": sum(shard["bytes"] for shard in shards[split]),
            "captions": caption_statistics([item.captions for item in kept[split]], tokenizer),
            "short_side": [
                min(shard["short_side"][0] for shard in shards[split]),
                max(shard["short_side"][1] for shard in shards[split]),
            ],
            "shards": shards[split],
        }
        for split in kept
        if shards.get(split)
    }
    manifest = _manifest(splits, tokenizer, problems, options)
    place.write("bad_samples.jsonl", problem_lines(problems))
    if options.about.get("credit"):
        about = options.about
        text = f"# {about['name']}\n\n{about['credit']}\n\nLicence: {about.get('licence', 'unknown')}\n"
        place.write("README.md", text.encode())
    write_report(place, manifest, problems)
    place.settle([shard["name"] for split in splits.values() for shard in split["shards"]])
    place.write("manifest.json", manifest_bytes(manifest))
    place.settle(["manifest.json"])
    return manifest


def _number(place: Folder, results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Drop empty shards and rename the rest so that numbers have no gap; returns the shards of each split."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        listed = shards.setdefault(result["split"], [])
        new = f"{result['split']}-{len(listed):05d}.tar" if result["samples"] else ""
        _move(place, result, new)
        if not new:
            continue
        listed.append(
            {"name": new}
            | {name: result[name] for name in SHARD_FACTS}
            | {"left_out": len(result["rejected"]), "short_side": result["sides"]}
        )
    return shards


def put_back(place: Folder, results: dict[str, dict[str, Any]]) -> None:
    """Undo the renaming, so that shards that are written again find their names free. Raises OSError."""
    for result in reversed(results.values()):
        if result["file"]:
            _move(place, result, result["name"])


def _move(place: Folder, result: dict[str, Any], new: str) -> None:
    """Give the tar and the index of a shard another name, or with "" none, and note it."""
    old = result["file"]
    if new == old:
        return
    for suffix in (".index", ".tar"):
        if new:
            place.rename(old[:-4] + suffix, new[:-4] + suffix)
        else:
            place.remove(old[:-4] + suffix)
    result["file"] = new
    place.write(f"{WORK}/{result['name'][:-4]}.json", json.dumps(result).encode())


def fingerprint(splits: dict[str, Any], token_sha: str) -> str:
    """sha256 over the names and checksums of all shards, and the tokenizer's."""
    sums = [f"{shard['name']} {shard['sha256']}" for split in splits.values() for shard in split["shards"]]
    return hashlib.sha256("\n".join([*sums, token_sha]).encode()).hexdigest()


def _manifest(
    splits: dict[str, Any], tokenizer: Tokenizer, problems: Sequence[dict[str, Any]], options: Options
) -> dict[str, Any]:
    described = tokenizer_entry(tokenizer)
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(splits, described["sha256"]),
        **options.about,
        "image_size": options.size or None,
        "splits": splits,
        "tokenizer": described,
        "bad_samples": dict(sorted(count_reasons(problems).items())),
    }
