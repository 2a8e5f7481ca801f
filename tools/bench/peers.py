"""The loaders that the stream benchmark compares. Each function starts a loader and returns an iterator of its batches.

A batch is (images [64, 3, 256, 256] as uint8 or float, a list of captions). Every loader shuffles, decodes in `workers`
processes, and is configured as its documentation shows. If `decode` is None, the loader also decodes as its
documentation shows.
"""

from __future__ import annotations

import datetime
import importlib.machinery
import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

BATCH, SIZE, SHUFFLE = 64, 256, 1000
Decode = Callable[[bytes], Any] | None
Batches = Iterator[Any]


@dataclass
class Location:
    """The location of a loader's data: `folder` (see sets.py), or `remote`, which has the same names, if it is set."""

    folder: str
    workers: int
    remote: str = ""
    """s3://bucket/prefix; empty: the data is on the disk."""
    cache: str = ""
    """An empty folder for the files that a loader caches."""

    def url(self, name: str) -> str:
        return f"{self.remote or self.folder}/{name}"


def fast(data: bytes) -> Tensor:
    """The decoder that all loaders use in table 1: uint8 [3, SIZE, SIZE]."""
    from dist_t2i.data.images import decode, square

    return square(decode(bytes(data), SIZE), SIZE)  # litdata passes a memoryview


def from_pillow(image: Any) -> Tensor:
    """The central square of a Pillow picture at SIZE, as torchvision's Resize, CenterCrop and ToTensor compute it."""
    import numpy
    import torch

    scale = SIZE / min(image.size)
    image = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), 2)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = numpy.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float().div(255)


def pillow(data: bytes) -> Tensor:
    from PIL import Image

    return from_pillow(Image.open(io.BytesIO(data)))


def collate(samples: list[Any]) -> tuple[Tensor, list[str]]:
    import torch

    return torch.stack([sample[0] for sample in samples]), [sample[1] for sample in samples]


def dist_t2i(location: Location, decode: Decode) -> Batches:
    """The stream of this project. This loader also tokenizes, and its only decoder is `fast`."""
    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.open_data import open_data
    from dist_t2i.data.stream.stream import open_stream

    train, cache = location.url("set"), location.cache or "auto"
    data = DataConfig(train=train, image_size=SIZE, workers=location.workers, flip=False, cache=cache)
    data_set = open_data(data)
    for batch in open_stream(data, data_set.tokenizer, seed=0, global_batch=BATCH, data_set=data_set):
        yield batch.images, batch.captions


def webdataset(location: Location, decode: Decode) -> Batches:
    """Reads S3 through signed URLs and curl, so it does not need the AWS command line."""
    import webdataset as wds

    urls = sorted(str(path) for path in Path(location.folder, "set").glob("train-*.tar"))
    if location.remote:
        urls = signed(location.remote, [f"set/{Path(url).name}" for url in urls])
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(SHUFFLE)
    if decode:
        dataset = dataset.map(lambda sample: (decode(sample["jpg"]), json.loads(sample["json"])["captions"][0]))
    else:
        dataset = dataset.decode("pil").map(lambda sample: (from_pillow(sample["jpg"]), sample["json"]["captions"][0]))
    dataset = dataset.batched(BATCH, collation_fn=collate, partial=False)
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=location.workers))


def signed(remote: str, names: list[str]) -> list[str]:
    """http:// URLs of objects below s3://bucket/prefix, valid for an hour."""
    import obstore
    from obstore.store import S3Store

    bucket, prefix = remote.removeprefix("s3://").split("/", 1)
    keys = [f"{prefix}/{name}" for name in names]
    return list(obstore.sign(S3Store(bucket), "GET", keys, datetime.timedelta(hours=1)))


def litdata(location: Location, decode: Decode) -> Batches:
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # litdata has no option for a server on plain HTTP
    unpack = decode or pillow

    class Pictures(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return unpack(sample["image"]), json.loads(sample["captions"])[0]

    cache = {"cache_dir": location.cache} if location.remote else {}
    dataset = Pictures(location.url("litdata"), shuffle=True, drop_last=True, **cache)
    return iter(
        litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=location.workers, collate_fn=collate)
    )


def mds(location: Location, decode: Decode) -> Batches:
    replace_torchvision()
    import streaming

    unpack = decode or pillow

    class Pictures(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return unpack(sample["image"]), sample["captions"][0]

    os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")
    url = location.url("mds")
    folders = {"remote": url, "local": location.cache} if location.remote else {"local": url}
    options = {"batch_size": BATCH, "num_workers": location.workers, "collate_fn": collate, "drop_last": True}
    return iter(streaming.StreamingDataLoader(Pictures(**folders, shuffle=True, batch_size=BATCH), **options))


def replace_torchvision() -> None:
    """Replaces torchvision with placeholders if it cannot be imported (its wheel needs a CUDA build of torch).
    Placeholders suffice, because mosaicml-streaming imports names from torchvision but never calls them."""
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


def energon(location: Location, decode: Decode) -> Batches:
    from megatron import energon as nv

    path = location.url("energon")
    if location.remote:
        write_msc_config(Path(location.cache, "msc.yaml"), location.remote)
        path = "msc://bench/" + path.removeprefix("s3://").split("/", 1)[1]

    @nv.stateless
    def cook(sample: dict[str, Any]) -> Any:
        texts = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
        return nv.CaptioningSample(**nv.basic_sample_keys(sample), image=sample["jpg"], caption=texts["captions"][0])

    class Task(nv.DefaultTaskEncoder):
        cookers = (nv.Cooker(cook),)
        decoder = None if decode else nv.SampleDecoder(image_decode="pil")

        @nv.stateless
        def encode_sample(self, sample: Any) -> Any:  # runs after the shuffle buffer, so the buffer contains bytes
            sample.image = decode(sample.image) if decode else from_pillow(sample.image)
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return collate([(sample.image, sample.caption) for sample in samples])

    dataset = nv.get_train_dataset(
        path,
        worker_config=nv.WorkerConfig(rank=0, world_size=1, num_workers=location.workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=None,
        task_encoder=Task(),
    )
    return iter(nv.get_loader(dataset))


def write_msc_config(path: Path, remote: str) -> None:
    """Writes the profile `bench` of NVIDIA's storage client, through which energon reads S3."""
    address = {"endpoint_url": "AWS_ENDPOINT_URL", "region_name": "AWS_REGION"}
    keys = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY"}
    server, credentials = ({key: os.environ[variable] for key, variable in part.items()} for part in (address, keys))
    server["base_path"] = remote.split("/")[2]
    profile = {
        "storage_provider": {"type": "s3", "options": server},
        "credentials_provider": {"type": "S3Credentials", "options": credentials},
    }
    path.write_text(json.dumps({"profiles": {"bench": profile}}))
    os.environ["MSC_CONFIG"] = str(path)


class Loader(NamedTuple):
    batches: Callable[[Location, Decode], Batches]
    modules: tuple[str, ...]
    """Modules that are imported before the measurement, so that the first batch does not import them."""
    package: str = ""
    """Name on PyPI; empty for this project."""


LOADERS = {
    "dist_t2i": Loader(dist_t2i, ("webdataset", "dist_t2i.data.open_data", "dist_t2i.data.stream.stream")),
    "webdataset": Loader(webdataset, ("webdataset",), "webdataset"),
    "litdata": Loader(litdata, ("litdata",), "litdata"),
    "mds": Loader(mds, ("streaming",), "mosaicml-streaming"),
    "energon": Loader(energon, ("megatron.energon",), "megatron-energon"),
}


def preload(name: str) -> None:
    """Import a loader's modules, so that the time to the first batch does not include imports."""
    if name == "mds":
        replace_torchvision()
    for module in LOADERS[name].modules:
        importlib.import_module(module)
