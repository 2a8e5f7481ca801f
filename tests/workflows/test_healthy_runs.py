"""Ten healthy runs of different kinds, in which the checks of a run's health find nothing (`make long`).

A sign must hold for only a fifth of the time that the default asks for, so that the thresholds have some margin.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from dist_t2i.checkpoint import store
from dist_t2i.data.scenes import captions, render, sample_scene
from dist_t2i.sharding.sources.folder import find_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from ranks import ROOT
from runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

SIZE, IMAGES = 32, 12_800
CONFIG = """
data: {image_size: 32, max_tokens: 20, flip: false}
text: {embedding: 64}
model:
  generator: {noise: 32, condition: 32, channels: [64, 48, 32]}
  discriminator: {channels: [32, 48, 64], embedding: 64, regions: [8]}
optimizer: {warmup_images: 1000}
train: {global_batch: 32, divergence_images: 1024}
engine: {precision: fp32}
checkpoint: {every_images: 3200}
"""


def scene(index: int) -> tuple[Image.Image, list[str]]:
    found = sample_scene(0, index)
    return Image.fromarray(render(found, SIZE)), captions(found)


def dark(index: int) -> tuple[Image.Image, list[str]]:
    """A scene at night: at most 15% of the brightness."""
    picture, texts = scene(index)
    return picture.point(lambda value: value * 0.15), texts


def drawing(index: int, *, filled: bool) -> tuple[Image.Image, list[str]]:
    """One shape on white paper, filled with a color or as a thin black line."""
    chance = random.Random(index)
    kind, color = chance.choice(["circle", "square", "triangle"]), chance.choice(["red", "green", "blue", "orange"])
    large = Image.new("RGB", (4 * SIZE, 4 * SIZE), "white")  # reduced below: antialiased
    side, left, top = chance.randrange(40, 80), chance.randrange(4, 44), chance.randrange(4, 44)
    box = (left, top, left + side, top + side)
    style = {"fill": color} if filled else {"outline": "black", "width": 4}
    draw = ImageDraw.Draw(large)
    if kind == "triangle":
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], **style)
    else:
        (draw.ellipse if kind == "circle" else draw.rectangle)(box, **style)
    text = f"{color} {kind}" if filled else kind
    return large.resize((SIZE, SIZE), Image.Resampling.BOX), [f"a {text}", f"the drawing of a {text}"]


SETS: dict[str, tuple[int, Callable[[int], tuple[Image.Image, list[str]]]]] = {
    "scenes": (2000, scene),
    "small": (500, scene),
    "dark": (2000, dark),
    "lines": (2000, lambda index: drawing(index, filled=False)),
    "white": (2000, lambda index: drawing(index, filled=True)),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Callable[[str], Path]:
    """`sets(name)` returns the folder of a set, which is written when it is first needed."""
    root = tmp_path_factory.mktemp("sets")

    def folder_of(name: str) -> Path:
        folder, (count, make) = root / name, SETS[name]
        if not folder.exists():
            (folder / "pictures").mkdir(parents=True)
            lines = []
            for index in range(count):
                picture, texts = make(index)
                picture.save(folder / "pictures" / f"{index}.png")
                lines.append(json.dumps({"image": f"{index}.png", "captions": texts}))
            (folder / "captions.jsonl").write_text("\n".join(lines))
            items, problems = find_items(folder / "pictures", folder / "captions.jsonl", 0.0)
            write_set(folder / "set", items, problems, Options())
        return folder / "set"

    return folder_of


def assert_healthy(run: Run, images: int) -> None:
    assert run.train(timeout=3000) == 0, run.output()
    log = (run.folder / "log.txt").read_text()
    assert "warning" not in log, log
    found = store.load_latest(run.folder)
    assert found is not None and found.images == images
    health = found.state["health"]
    assert health["since"] is None and health["episodes"] == {} and health["healthy"] == images, health


@pytest.mark.parametrize(
    ("kind", "name", "overrides"),
    [
        ("line art", "lines", ()),
        ("dark pictures", "dark", ()),
        ("white backgrounds", "white", ()),
        ("a set of 500 pictures", "small", ()),
        ("edit", "scenes", ("edit.width=16",)),
        ("attn", "scenes", ("model.generator.kind=attn", "model.discriminator.words=8")),
        ("shared", "scenes", ("text.mode=shared",)),
        ("bf16", "scenes", ("engine.precision=bf16",)),
    ],
)
def test_a_healthy_run(kind, name, overrides, sets, tmp_path):
    run = Run(tmp_path / "run", sets(name), f"train.total_images={IMAGES}", *overrides)
    run.config.write_text(CONFIG)
    assert_healthy(run, IMAGES)


def test_a_frozen_encoder(sets, tmp_path):
    """A table with a random vector for each caption."""
    texts = sorted({text for index in range(SETS["scenes"][0]) for text in scene(index)[1]})
    vectors = torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(0))
    save_file({"vectors": vectors}, tmp_path / "table.safetensors", metadata={"captions": json.dumps(texts)})
    frozen = ("text.mode=frozen", f"text.frozen={tmp_path / 'table.safetensors'}")
    run = Run(tmp_path / "run", sets("scenes"), f"train.total_images={IMAGES}", *frozen)
    run.config.write_text(CONFIG)
    assert_healthy(run, IMAGES)


def test_the_demo_with_muon(tmp_path):
    pytest.importorskip("resvg_py")
    from dist_t2i.cli.common import write_built_in_set

    write_built_in_set("openmoji", tmp_path / "set", SIZE)
    run = Run(tmp_path / "run", tmp_path / "set", "train.total_images=9728", "train.divergence_images=1024")
    run.config.write_text((ROOT / "configs" / "openmoji32.yaml").read_text())
    assert_healthy(run, 9728)
