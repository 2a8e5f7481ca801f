"""The data of the stream benchmark: JPEGs similar to COCO's with captions, in the format of each loader."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw

from dist_t2i.utils.processes import usable_cores

SIZE = (640, 480)
QUALITY = 90
TARS = 16
_NOISE = ((5, 60.0), (10, 45.0), (20, 32.0), (40, 22.0), (80, 15.0), (160, 10.0), (320, 6.0))
"""(width of a grid of random numbers, amplitude). The sum of all grids has similar power at each scale, like photos."""
_WORDS = """a the two man woman dog cat child bird horse street kitchen table beach field train bus bicycle plate pizza
standing sitting riding holding eating next to on in front of with under red blue white small large old young""".split()


def picture(number: int) -> bytes:
    """A JPEG of SIZE that depends only on `number`. The picture shows noise and shapes, and has 115 KB on average, as
    in COCO."""
    random = numpy.random.default_rng(number)
    pixels = numpy.full((SIZE[1], SIZE[0], 3), 128.0, dtype=numpy.float32)
    for width, strength in _NOISE:
        grid = random.integers(0, 256, (width * 3 // 4, width, 3), dtype=numpy.uint8)
        noise = numpy.asarray(Image.fromarray(grid).resize(SIZE, Image.Resampling.BICUBIC))
        pixels += (noise - 128.0) * (strength / 128)
    grain = random.uniform(2.0, 15.5)
    pixels += random.standard_normal((SIZE[1], SIZE[0], 1), dtype=numpy.float32) * grain
    image = Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(2, 8))):
        x, y, wide, high = random.uniform(0, 1, 4) * [SIZE[0], SIZE[1], SIZE[0] / 5, SIZE[1] / 5]
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + wide, y + high), fill=tuple(random.integers(0, 256, 3).tolist()))
    out = BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def captions(number: int) -> list[str]:
    """Five captions of about ten words, as in COCO."""
    random = numpy.random.default_rng(10**9 + number)
    return [" ".join(random.choice(_WORDS, int(random.integers(8, 13)))) for _ in range(5)]


def write_captions(path: Path, pictures: Iterable[str]) -> None:
    """Write a JSONL file with captions of these pictures, in the form that `tools/shard.py folder` reads."""
    lines = (json.dumps({"image": name, "captions": captions(number)}) for number, name in enumerate(pictures))
    path.write_text("".join(f"{line}\n" for line in lines))


def samples(pictures: Path) -> list[tuple[Path, list[str]]]:
    """Paths and captions of all pictures."""
    lines = map(json.loads, (pictures / "captions.jsonl").read_text().splitlines())
    return [(pictures / line["image"], line["captions"]) for line in lines]


class Sets:
    """FOLDER/N/{pictures,set,energon,litdata,mds}: N pictures as files and in the format of each loader."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images, self.processes = folder / str(images), images, usable_cores()

    def make(self, loaders: list[str]) -> None:
        """Write the folders that are missing."""
        self._once("pictures", self._pictures)
        self._once("set", self._set)
        for name, make in (("energon", self._energon), ("litdata", self._litdata), ("mds", self._mds)):
            if name in loaders:
                self._once(name, make)

    def _once(self, name: str, make: Callable[[Path], None]) -> None:
        """Run `make(temporary folder)` and rename the folder, unless the result exists already."""
        folder, temporary = self.folder / name, self.folder / f".{name}"
        if folder.exists():
            return
        print(f"writing {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(temporary, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        make(temporary)
        temporary.rename(folder)

    def _pictures(self, folder: Path) -> None:
        folder.mkdir()
        names = [f"{number:012d}.jpg" for number in range(self.images)]
        with multiprocessing.get_context("fork").Pool(self.processes) as pool:
            for name, data in zip(names, pool.imap(picture, range(self.images), chunksize=16), strict=True):
                (folder / name).write_bytes(data)
        write_captions(folder / "captions.jsonl", names)

    def _set(self, folder: Path) -> None:
        from dist_t2i.sharding.sources.folder import find_items
        from dist_t2i.sharding.write_set import write_set
        from dist_t2i.sharding.writing.prepare import Options

        pictures = self.folder / "pictures"
        items, problems = find_items(pictures, pictures / "captions.jsonl", 0.0)
        write_set(folder, items, problems, Options(shard_samples=-(-self.images // TARS), processes=self.processes))

    def _energon(self, folder: Path) -> None:
        from megatron.energon.flavors import BaseWebdatasetFactory

        folder.mkdir()
        tars = sorted((self.folder / "set").glob("train-*.tar"))
        for tar in tars:
            os.link(tar, folder / tar.name)
        BaseWebdatasetFactory.prepare_dataset(
            folder.resolve(),
            [tar.name for tar in tars],
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=self.processes,
        )
        yaml = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(yaml)

    def _litdata(self, folder: Path) -> None:
        # Runs in a separate process, because litdata's workers import the main program again.
        program = "from tools.bench.sets import write_litdata; import sys; write_litdata(*sys.argv[1:])"
        command = [sys.executable, "-W", "ignore", "-c", program, str(self.folder / "pictures"), str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def _mds(self, folder: Path) -> None:
        from tools.bench.peers import replace_torchvision

        replace_torchvision()
        from streaming import MDSWriter

        columns = {"image": "bytes", "captions": "json"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=2**26) as writer:
            for path, texts in samples(self.folder / "pictures"):
                writer.write({"image": path.read_bytes(), "captions": texts})


def _litdata_sample(sample: tuple[str, str]) -> dict[str, Any]:
    path, texts = sample
    return {"image": Path(path).read_bytes(), "captions": texts}


def write_litdata(pictures: str, out: str) -> None:
    """Write the pictures in litdata's format, in chunks of 64 MB, litdata's default."""
    import litdata

    inputs = [(str(path), json.dumps(texts)) for path, texts in samples(Path(pictures))]
    litdata.optimize(_litdata_sample, inputs, output_dir=out, chunk_bytes="64MB", num_workers=1, verbose=False)
