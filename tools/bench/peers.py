"""The loaders of the stream benchmark: each a function that starts one and yields its batches.

A batch is (uint8 or float images [64, 3, 256, 256], a list of captions). Every loader shuffles, decodes in `workers`
processes, and is set up as its documentation does it. `decode` is None for that documentation's own decoding.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BATCH, SIZE, SHUFFLE = 64, 256, 1000


@dataclass
class Place:
    """Where a loader reads: `folder` of Sets on disk, or the same below `bucket` of an S3 server."""

    folder: str
    images: int
    workers: int
    remote: str = ""
    """s3://bucket/prefix, "" for the disk."""
    cache: str = ""
    """An empty folder for what a loader keeps on disk."""

    def url(self, name: str) -> str:
        return f"{self.remote or self.folder}/{name}"


def fast(data: bytes) -> torch.Tensor:
    """The decoder that all are given: uint8 [3, SIZE, SIZE]."""
    from dist_t2i.data.images import decode, square

    return square(decode(bytes(data), SIZE), SIZE)  # litdata gives a memoryview


def from_pillow(image: Any) -> torch.Tensor:
    """The central square of a Pillow picture at SIZE, as torchvision's Resize, CenterCrop and ToTensor make it."""
    import numpy

    scale = SIZE / min(image.size)
    image = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), 2)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = numpy.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float().div(255)


def pillow(data: bytes) -> torch.Tensor:
    import io

    from PIL import Image

    return from_pillow(Image.open(io.BytesIO(data)))


Decode = Callable[[bytes], torch.Tensor] | None
Batches = Iterator[Any]


def collate(samples: list[Any]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([sample[0] for sample in samples]), [sample[1] for sample in samples]


def dist_t2i(place: Place, decode: Decode) -> Batches:
    """Ours; it also tokenizes."""
    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.open_data import open_data
    from dist_t2i.data.stream.stream import open_stream

    data = DataConfig(
        train=place.url("set"), image_size=SIZE, workers=place.workers, flip=False, cache=place.cache or "auto"
    )
    data_set = open_data(data)
    for batch in open_stream(data, data_set.tokenizer, seed=0, global_batch=BATCH, data_set=data_set):
        yield batch.images, batch.captions


def webdataset(place: Place, decode: Decode) -> Batches:
    """Over HTTP, its way to an S3 server without the AWS command line: signed URLs, read by curl."""
    import webdataset as wds

    urls = sorted(str(path) for path in Path(place.folder, "set").glob("train-*.tar"))
    if place.remote:
        urls = signed([place.url(f"set/{Path(url).name}") for url in urls])
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(SHUFFLE)
    if decode:
        dataset = dataset.map(lambda sample: (decode(sample["jpg"]), json.loads(sample["json"])["captions"][0]))
    else:
        dataset = dataset.decode("pil").map(lambda sample: (from_pillow(sample["jpg"]), sample["json"]["captions"][0]))
    dataset = dataset.batched(BATCH, collation_fn=collate, partial=False)
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=place.workers))


def signed(urls: list[str]) -> list[str]:
    """s3:// URLs as http:// ones that are good for an hour."""
    import datetime

    import obstore
    from obstore.store import S3Store

    bucket = urls[0].split("/")[2]
    keys = [url.split("/", 3)[3] for url in urls]
    return list(obstore.sign(S3Store(bucket), "GET", keys, datetime.timedelta(hours=1)))


def litdata(place: Place, decode: Decode) -> Batches:
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no option for a server on plain HTTP
    unpack = decode or pillow

    class Pictures(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return unpack(sample["image"]), json.loads(sample["captions"])[0]

    cache = {"cache_dir": place.cache} if place.remote else {}
    dataset = Pictures(place.url("litdata"), shuffle=True, drop_last=True, **cache)
    return iter(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=place.workers, collate_fn=collate))


def mds(place: Place, decode: Decode) -> Batches:
    stand_in_for_torchvision()
    import streaming

    unpack = decode or pillow

    class Pictures(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return unpack(sample["image"]), sample["captions"][0]

    os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")
    where = {"remote": place.url("mds"), "local": place.cache} if place.remote else {"local": place.url("mds")}
    dataset = Pictures(**where, shuffle=True, batch_size=BATCH)
    return iter(
        streaming.StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=place.workers, collate_fn=collate, drop_last=True
        )
    )


def stand_in_for_torchvision() -> None:
    """mosaicml-streaming imports two names of torchvision that nothing here calls; its wheel needs a CUDA build of torch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        contents: dict[str, dict[str, Any]] = {
            "torchvision": {},
            "torchvision.datasets": {"VisionDataset": object},
            "torchvision.transforms": {},
            "torchvision.transforms.functional": {"to_tensor": None},
        }
        for name, values in contents.items():
            module = sys.modules[name] = types.ModuleType(name)
            vars(module).update(values, __spec__=importlib.machinery.ModuleSpec(name, None))


def energon(place: Place, decode: Decode) -> Batches:
    from megatron import energon as nv

    if place.remote:
        write_msc_config(Path(place.cache, "msc.yaml"), place.remote)

    @nv.stateless
    def cook(sample: dict[str, Any]) -> Any:
        texts = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
        return nv.CaptioningSample(**nv.basic_sample_keys(sample), image=sample["jpg"], caption=texts["captions"][0])

    class Task(nv.DefaultTaskEncoder):
        cookers = (nv.Cooker(cook),)
        decoder = None if decode else nv.SampleDecoder(image_decode="pil")

        @nv.stateless
        def encode_sample(self, sample: Any) -> Any:  # behind the shuffle buffer, which so holds bytes
            sample.image = decode(sample.image) if decode else from_pillow(sample.image)
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return collate([(sample.image, sample.caption) for sample in samples])

    path = "msc://bench" + place.remote.removeprefix("s3://data") + "/energon" if place.remote else place.url("energon")
    dataset = nv.get_train_dataset(
        path,
        worker_config=nv.WorkerConfig(rank=0, world_size=1, num_workers=place.workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=None,
        task_encoder=Task(),
    )
    return iter(nv.get_loader(dataset))


def write_msc_config(path: Path, remote: str) -> None:
    """The profile `bench` of NVIDIA's storage client, which energon reads S3 through."""
    bucket = remote.split("/")[2]
    profile = {
        "storage_provider": {
            "type": "s3",
            "options": {
                "base_path": bucket,
                "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
                "region_name": os.environ["AWS_REGION"],
            },
        },
        "credentials_provider": {
            "type": "S3Credentials",
            "options": {
                "access_key": os.environ["AWS_ACCESS_KEY_ID"],
                "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            },
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"profiles": {"bench": profile}}))
    os.environ["MSC_CONFIG"] = str(path)


LOADERS: dict[str, Callable[[Place, Decode], Batches]] = {
    "dist_t2i": dist_t2i,
    "webdataset": webdataset,
    "litdata": litdata,
    "mds": mds,
    "energon": energon,
}
PACKAGES = {
    "webdataset": "webdataset",
    "litdata": "litdata",
    "mds": "mosaicml-streaming",
    "energon": "megatron-energon",
}
MODULES = {"webdataset": "webdataset", "litdata": "litdata", "mds": "streaming", "energon": "megatron.energon"}
