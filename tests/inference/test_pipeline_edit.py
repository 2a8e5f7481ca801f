"""Editing a picture with a model: strengths, a user's own files, refused files, and the command line."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import dist_t2i
from dist_t2i.checkpoint import store
from dist_t2i.errors import UserError
from dist_t2i.inference.pipeline import PromptError, UnknownWordsWarning
from dist_t2i.publish.export import export
from models_on_disk import write_run
from ranks import ROOT
from runs import environment

TEXT = "woman pilot dark skin tone"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that edits, with layers that have left zero as after training."""
    return write_run(tmp_path_factory.mktemp("runs") / "edit", "edit.width=8", "edit.init=somewhere", stir="source.")


@pytest.fixture(scope="module")
def model(run):
    return dist_t2i.load(run, "cpu")


def noise(size=(32, 32), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data(image: Image.Image) -> bytes:
    return image.tobytes()


def test_strength_goes_from_the_source_to_the_edit(model):
    source = noise()
    edits = [np.asarray(model.edit(source, TEXT, strength=s)).astype(int) for s in (0, 0.5, 1.0)]
    assert np.array_equal(edits[0], np.asarray(source))
    assert not np.array_equal(edits[2], edits[0])
    inside = (edits[2] > 0) & (edits[2] < 255)
    assert (abs(edits[1] - (edits[0] + edits[2]) / 2)[inside] <= 1).all()
    assert data(model.edit(source, TEXT)) == edits[2].astype(np.uint8).tobytes()


def test_text_picture_and_seed_matter_and_the_batch_does_not(model):
    one = model.edit(noise(), TEXT, seed=3)
    assert (
        len({data(p) for p in (one, model.edit(noise(), "red apple", seed=3), model.edit(noise(seed=1), TEXT, seed=3))})
        == 3
    )
    assert data(model.edit(noise(), TEXT, seed=4)) != data(one)
    sources = torch.from_numpy(np.stack([np.asarray(noise(seed=s)) for s in range(3)])).permute(0, 3, 1, 2)
    together = model.sample_edits(sources, [TEXT, "red apple", TEXT], [5, 6, 7])
    assert torch.equal(model.sample_edits(sources[1:2], ["red apple"], [6])[0], together[1])
    assert model.sample_edits(sources[:0], [], []).shape == (0, 3, 32, 32)


def test_a_users_own_file_of_any_kind(model, tmp_path):
    wide, clear = noise((90, 40)), Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    for name, picture in (
        ("wide.png", wide),
        ("a.webp", noise((40, 64))),
        ("b.jpg", noise((33, 80))),
        ("c.gif", noise()),
    ):
        picture.save(tmp_path / name)
        assert model.edit(tmp_path / name, TEXT).size == (32, 32)
    clear.save(tmp_path / "clear.png")
    white = Image.new("RGB", (50, 50), "white")
    assert data(model.edit(str(tmp_path / "clear.png"), TEXT)) == data(model.edit(white, TEXT))
    centre = wide.crop((25, 0, 65, 40))
    assert (
        data(model.edit(tmp_path / "wide.png", TEXT)) == data(model.edit(centre, TEXT)) == data(model.edit(wide, TEXT))
    )


def test_what_cannot_be_edited_is_said_in_one_line(model, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    cut = io.BytesIO()
    noise((64, 64)).save(cut, "PNG")
    (tmp_path / "cut.png").write_bytes(cut.getvalue()[:2000])
    noise((4, 4)).save(tmp_path / "tiny.png")
    for wrong, said in (
        (tmp_path / "none.png", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "text.png", "does not decode.*PNG, JPEG"),
        (tmp_path / "cut.png", "does not decode"),
        (tmp_path / "tiny.png", "smaller than 8 pixels"),
        (b"bytes", "must be a PIL image"),
        (None, "got nothing"),
    ):
        with pytest.raises(PromptError, match=said) as caught:
            model.edit(wrong, TEXT)
        assert "\n" not in str(caught.value)
    for strength in (-0.1, 1.5, float("nan"), "1", True):
        with pytest.raises(PromptError, match="strength must be a number from 0 to 1"):
            model.edit(noise(), TEXT, strength=strength)
    with pytest.raises(PromptError, match=r"text\[0\]"):
        model.edit(noise(), 3)
    with pytest.warns(UnknownWordsWarning, match="blorp"):
        model.edit(noise(), "a blorp pilot")


def test_a_model_that_only_draws_says_so(tmp_path):
    drawing = dist_t2i.load(write_run(tmp_path / "run"), "cpu")
    with pytest.raises(UserError, match=r"trained with edit\.width=0"):
        drawing.edit(noise(), TEXT)


def test_an_export_edits_alike_and_names_no_other_model(run, model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = export(run, tmp_path / "export")
    assert "somewhere" not in (exported / "config.yaml").read_text()
    assert data(dist_t2i.load(exported, "cpu").edit(noise(), TEXT)) == data(model.edit(noise(), TEXT))


def test_a_run_that_edits_nothing_has_no_new_tensors(tmp_path, run):
    saved = [store.load_latest(r).tensors("ema") for r in (write_run(tmp_path / "run"), run)]
    new = set(saved[1]) - set(saved[0])
    assert new and all(name.startswith("source.") for name in new) and not set(saved[0]) - set(saved[1])
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "edit.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)))


def test_the_command_line(run, model, tmp_path):
    noise((64, 48)).save(tmp_path / "mine.png")
    out = tmp_path / "out.png"
    done = tool(
        "--run", run, "--image", tmp_path / "mine.png", TEXT, "--out", out, "--strength", 0.5, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert data(Image.open(out)) == data(model.edit(tmp_path / "mine.png", TEXT, strength=0.5))
    assert str(out) in done.stdout
    done = tool("--run", run, "--image", tmp_path / "other.png", TEXT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No such file" in done.stderr
