"""Turns shards into a set: numbers the shards, and writes the tokenizer, statistics, report and manifest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dist_t2i.data.manifest import FORMAT, VERSION, caption_statistics, manifest_bytes, problem_lines, tokenizer_entry
from dist_t2i.data.tokenizer import train_tokenizer
from dist_t2i.sharding.items import Item
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.report import write_report
from dist_t2i.sharding.writing.shard_writer import ShardPlan
from dist_t2i.storage.folders import WORK, Folder


def finish(
    folder: Folder,
    plans: Sequence[ShardPlan],
    results: Sequence[dict[str, Any]],
    problems: list[dict],
    options: Options,
) -> dict[str, Any]:
    """Numbers the shards without gaps and writes all other files, with the manifest last. Returns the manifest. Raises
    OSError."""
    folder.remove("manifest.json")
    written: dict[str, list[Item]] = {plan.split: [] for plan in plans}
    for plan, result in zip(plans, results, strict=True):
        rejected = set(result["rejected"])
        written[plan.split].extend(item for number, item in enumerate(plan.items) if number not in rejected)
    counts = Counter(caption for item in written["train"] for caption in item.captions)
    tokenizer = train_tokenizer(counts, options.vocabulary)
    folder.write("tokenizer.json", tokenizer.text.encode())
    splits = {}
    for split, shards in _number(folder, results).items():
        sides = [side for shard in shards for side in shard["short_side"]]
        splits[split] = {
            "samples": sum(shard["samples"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "captions": caption_statistics([item.captions for item in written[split]], tokenizer),
            "short_side": [min(sides), max(sides)],
            "shards": shards,
        }
    tokenizer_facts, about = tokenizer_entry(tokenizer), options.about
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(splits, tokenizer_facts["sha256"]),
        **about,
        "image_size": options.size or None,
        "splits": splits,
        "tokenizer": tokenizer_facts,
        "bad_samples": dict(sorted(Counter(problem["reason"] for problem in problems).items())),
    }
    folder.write("bad_samples.jsonl", problem_lines(problems))
    if about.get("credit"):
        text = f"# {about['name']}\n\n{about['credit']}\n\nLicence: {about.get('licence', 'unknown')}\n"
        folder.write("README.md", text.encode())
    write_report(folder, manifest, problems)
    folder.settle([shard["name"] for split in splits.values() for shard in split["shards"]])
    folder.write("manifest.json", manifest_bytes(manifest))
    folder.settle(["manifest.json"])
    return manifest


def _number(folder: Folder, results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Deletes empty shards and numbers the other shards without gaps. Returns the manifest's shards by split."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        listed = shards.setdefault(result["split"], [])
        new = f"{result['split']}-{len(listed):05d}.tar" if result["samples"] else ""
        _rename(folder, result, new)
        if new:
            facts = {name: result[name] for name in ("samples", "bytes", "sha256", "index_sha256", "captions")}
            listed.append({"name": new, **facts, "left_out": len(result["rejected"]), "short_side": result["sides"]})
    return {split: listed for split, listed in shards.items() if listed}


def restore_names(folder: Folder, results: dict[str, dict[str, Any]]) -> None:
    """Reverses the renaming by `finish`, so that a rewritten shard cannot overwrite another shard. Raises OSError if a
    file cannot be renamed."""
    for result in reversed(results.values()):
        if result["file"]:
            _rename(folder, result, result["name"])


def _rename(folder: Folder, result: dict[str, Any], new: str) -> None:
    """Renames the tar and the index of a shard, or deletes both if `new` is "". Updates `result` and its file."""
    old = result["file"]
    if new == old:
        return
    for suffix in (".index", ".tar"):
        if new:
            folder.rename(old[:-4] + suffix, new[:-4] + suffix)
        else:
            folder.remove(old[:-4] + suffix)
    result["file"] = new
    folder.write(f"{WORK}/{result['name'][:-4]}.json", json.dumps(result).encode())


def fingerprint(splits: dict[str, Any], tokenizer_sha256: str) -> str:
    """SHA-256 over the names and checksums of all shards and the checksum of the tokenizer."""
    sums = [f"{shard['name']} {shard['sha256']}" for split in splits.values() for shard in split["shards"]]
    return hashlib.sha256("\n".join([*sums, tokenizer_sha256]).encode()).hexdigest()
