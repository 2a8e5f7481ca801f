"""Reads a stream as a training process does, and prints its samples.

usage: stream.py '{"data.train": "s3://...", ..., "images": 400, "start": 0, "rank": 0, "world_size": 1, "bad_file": "..."}'

Prints a JSON object: `rows` [[position, key, sum of the picture's values], ...], `bad` (reason -> count), `error`. It is a
program of its own because a process whose other parts talk to S3 cannot fork workers that do.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dist_t2i.config.fields import build
from dist_t2i.data.open_data import open_data
from dist_t2i.data.stream.stream import open_stream
from dist_t2i.errors import UserError

OWN = {"images": 0, "start": 0, "rank": 0, "world_size": 1, "bad_file": None, "pause": 0.0}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    own = {name: wanted.pop(name, default) for name, default in OWN.items()}
    config = build({"data.image_size": 32, "train.global_batch": 8, "train.seed": 3, **wanted})
    told = {"rows": [], "bad": {}, "error": "", "seconds": 0.0}
    begun = time.monotonic()
    try:
        data = open_data(config.data)
        stream = open_stream(
            config.data,
            data.tokenizer,
            seed=config.train.seed,
            global_batch=config.train.global_batch,
            accumulation=config.engine.accumulation,
            edit=config.edit,
            rank=own["rank"],
            world_size=own["world_size"],
            start_images=own["start"],
            bad_file=own["bad_file"],
            data_set=data,
        )
        while len(told["rows"]) * own["world_size"] < own["images"]:
            batch = next(stream)
            told["seconds"] = told["seconds"] or time.monotonic() - begun
            sums = batch.images.flatten(1).sum(1).tolist()
            told["rows"] += [list(row) for row in zip(batch.positions.tolist(), batch.keys, sums, strict=True)]
            time.sleep(own["pause"])
        told["bad"] = stream.bad_counts
        stream.close()
    except UserError as error:
        told["error"] = str(error)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
