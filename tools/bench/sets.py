"""The pictures of the stream benchmark, made once: COCO-like JPEGs with captions, in every loader's format."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw

SIZE = (640, 480)
QUALITY = 90
TARS = 16
_NOISE = ((5, 60.0), (10, 45.0), (20, 32.0), (40, 22.0), (80, 15.0), (160, 10.0), (320, 6.0))
"""Width of a grid of random numbers, and its strength: about as much at every scale, as in photographs."""
_WORDS = """a the two man woman dog cat child bird horse street kitchen table beach field train bus bicycle plate pizza
standing sitting riding holding eating next to on in front of with under red blue white small large old young""".split()


def picture(number: int) -> bytes:
    """A JPEG of SIZE, the same for the same number; 115 KB on average, as in COCO: noise at all scales, and shapes."""
    random = numpy.random.default_rng(number)
    pixels = numpy.full((SIZE[1], SIZE[0], 3), 128.0, dtype=numpy.float32)
    for width, strength in _NOISE:
        grid = random.integers(0, 256, (width * 3 // 4, width, 3), dtype=numpy.uint8)
        pixels += (numpy.asarray(Image.fromarray(grid).resize(SIZE, Image.Resampling.BICUBIC)) - 128.0) * (
            strength / 128
        )
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
    """Five of about ten words, as in COCO."""
    random = numpy.random.default_rng(10**9 + number)
    return [" ".join(random.choice(_WORDS, int(random.integers(8, 13)))) for _ in range(5)]


class Sets:
    """FOLDER/N/{pictures,set,energon,litdata,mds}: N pictures, as files and as each loader wants them."""

    def __init__(self, folder: Path, images: int, processes: int) -> None:
        self.folder, self.images, self.processes = folder / str(images), images, processes

    def make(self, loaders: list[str]) -> None:
        """Make what is missing."""
        self._once("pictures", self._pictures)
        self._once("set", self._set)
        makers = {"energon": self._energon, "litdata": self._litdata, "mds": self._mds}
        for name in loaders:
            if name in makers:
                self._once(name, makers[name])

    def urls(self, name: str) -> list[str]:
        """The tars of `set`."""
        return [str(path) for path in sorted((self.folder / name).glob("train-*.tar"))]

    def jpegs(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.folder / "pictures").glob("*.jpg"))]

    def _once(self, name: str, make: Any) -> None:
        """Run `make(folder)` unless the folder is there; it is written aside and renamed."""
        folder = self.folder / name
        if folder.exists():
            return
        print(f"making {folder}", file=sys.stderr, flush=True)
        aside = self.folder / f".{name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        make(aside)
        aside.rename(folder)

    def _pictures(self, folder: Path) -> None:
        folder.mkdir()
        with multiprocessing.get_context("fork").Pool(self.processes) as pool:
            for number, data in enumerate(pool.imap(picture, range(self.images), chunksize=16)):
                (folder / f"{number:012d}.jpg").write_bytes(data)
        lines = [
            json.dumps({"image": f"{number:012d}.jpg", "captions": captions(number)}) for number in range(self.images)
        ]
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")

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
        for url in self.urls("set"):
            os.link(url, folder / Path(url).name)
        names = [Path(url).name for url in self.urls("set")]
        BaseWebdatasetFactory.prepare_dataset(
            folder.resolve(), names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=self.processes
        )
        yaml = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(yaml)

    def _litdata(self, folder: Path) -> None:
        # In a process of its own: it starts workers that import the main program again.
        program = "from tools.bench.sets import write_litdata; import sys; write_litdata(*sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, str(self.folder / "pictures"), str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _mds(self, folder: Path) -> None:
        from tools.bench.peers import stand_in_for_torchvision

        stand_in_for_torchvision()
        from streaming import MDSWriter

        columns = {"image": "bytes", "captions": "json"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=2**26) as writer:
            for sample in samples(self.folder / "pictures"):
                writer.write(sample)


def samples(pictures: Path) -> list[dict[str, Any]]:
    """Bytes and captions of all pictures, as the peers' writers take them."""
    lines = map(json.loads, (pictures / "captions.jsonl").read_text().splitlines())
    return [{"image": (pictures / line["image"]).read_bytes(), "captions": line["captions"]} for line in lines]


def _litdata_sample(place: tuple[str, str]) -> dict[str, Any]:
    path, texts = place
    return {"image": Path(path).read_bytes(), "captions": texts}


def write_litdata(pictures: str, out: str) -> None:
    """litdata's format, in chunks of 64 MB, its own default."""
    import litdata

    lines = map(json.loads, Path(pictures, "captions.jsonl").read_text().splitlines())
    places = [(str(Path(pictures, line["image"])), json.dumps(line["captions"])) for line in lines]
    litdata.optimize(_litdata_sample, places, output_dir=out, chunk_bytes="64MB", num_workers=1, verbose=False)
