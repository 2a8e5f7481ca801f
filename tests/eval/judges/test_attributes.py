"""The detector of scene attributes: decoding, training targets, the cache, and how often it is right."""

import pytest
import torch

from dist_t2i.data import scenes
from dist_t2i.eval.contents.scene_scores import Named, right
from dist_t2i.eval.judges import attributes, detector
from dist_t2i.eval.judges.attributes import Shown
from dist_t2i.eval.judges.detector import (
    CELLS,
    COLORS,
    KINDS,
    SEED,
    SHAPES,
    WIDTH,
    Detector,
    Labels,
    loss_of,
    rendered,
    turned,
)
from dist_t2i.eval.judges.features import load_features


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A cache of its own and a training of seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(detector, "SCENES", 64)
    monkeypatch.setattr(detector, "STEPS", 3)
    return tmp_path / "dist_t2i"


def test_labels_turn_with_their_pictures():
    images, objects = torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, 6)
    images[0, :, 3, 10] = 1
    objects[0, 0, :3] = torch.tensor([1.0, 10.5 / 16, 3.5 / 16])
    for way in range(8):
        image, (found, *_) = turned(images, objects, way)[0][0, 0], turned(images, objects, way)[1][0]
        row, column = torch.nonzero(image)[0].tolist()
        assert found[1:3].tolist() == [(column + 0.5) / 16, (row + 0.5) / 16]
    assert len({tuple(turned(images, objects, way)[1].flatten().tolist()) for way in range(8)}) == 8


def perfect(labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions that have no loss."""
    cells = torch.zeros(len(labels.hue), 4 + len(COLORS) + len(SHAPES), CELLS, CELLS)
    cells[:, 0] = -20
    for row, objects in enumerate(labels.objects):
        for present, x, y, radius, color, shape in objects.tolist():
            for i in range(CELLS if present else 0):
                for j in range(CELLS):
                    away = max(abs(x * CELLS - j - 0.5), abs(y * CELLS - i - 0.5))
                    if away < 0.75:
                        cells[row, 0, i, j] = 20 if away <= 0.5 else -20
                        cells[row, 1:4, i, j] = torch.tensor(
                            [x * CELLS - j - 0.5, y * CELLS - i - 0.5, radius * 10 - 2]
                        )
                        cells[row, 4 + int(color), i, j] = cells[row, 4 + len(COLORS) + int(shape), i, j] = 20
    angle = labels.hue * 2 * torch.pi
    kinds = 20 * torch.nn.functional.one_hot(labels.kind, len(KINDS)).float()
    return cells, torch.cat([kinds, angle.cos()[:, None], angle.sin()[:, None]], 1)


def test_predictions_without_loss_decode_to_the_scene(monkeypatch):
    _, labels = rendered(40, 8)
    assert loss_of(*perfect(labels), labels) < 1e-3
    network = Detector()
    monkeypatch.setattr(network, "maps", lambda images: perfect(labels))
    shown = Shown.of(network(torch.zeros(40, 3, 32, 32)))
    assert torch.equal(shown.kind, labels.kind) and torch.allclose(shown.hue, labels.hue, atol=1e-3)
    assert torch.equal(shown.present.sum(1), labels.objects[..., 0].sum(1).long())
    for row in range(40):
        fields = (shown.x, shown.y, shown.radius, shown.color, shown.shape)
        found = [[field[row, slot].item() for field in fields] for slot in torch.nonzero(shown.present[row])[:, 0]]
        wanted = [item[1:].tolist() for item in labels.objects[row] if item[0]]
        assert sorted(found) == [pytest.approx(item, abs=1e-4) for item in sorted(wanted)]


def test_two_cells_that_share_an_object_show_it_once(monkeypatch):
    cells = torch.full((1, 4 + len(COLORS) + len(SHAPES), CELLS, CELLS), 0.0)
    cells[:, 0] = -20
    cells[0, 0, 4, 3:5] = torch.tensor([-0.1, -0.2])  # the object's center is on their border
    network = Detector()
    monkeypatch.setattr(network, "maps", lambda images: (cells, torch.zeros(1, 6)))
    assert Shown.of(network(torch.zeros(1, 3, 32, 32))).present.sum() == 1


def test_weights_are_trained_once_and_kept(small, capsys):
    first = load_features("scenes", "cpu")
    assert "training the detector" in capsys.readouterr().err
    images, _ = rendered(4, 32)
    again = load_features("scenes", "cpu")
    assert not capsys.readouterr().err and torch.equal(first(images), again(images))
    (path,) = small.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    repeated = load_features("scenes", "cpu")
    assert "training" in capsys.readouterr().err
    assert torch.equal(first(images), repeated(images)), "the training is deterministic"


def test_a_cache_that_cannot_be_written_is_said(small, monkeypatch, capsys):
    small.write_text("not a folder")
    assert load_features("scenes", "cpu").width == WIDTH
    assert "cannot be written" in capsys.readouterr().err


def test_the_hash_is_that_of_the_rules():
    assert attributes.digest(32) != attributes.digest(48) != attributes.digest(64) == attributes.digest(256)
    code = attributes._code(detector)
    assert "def loss_of(" in code and "#" not in code and "CenterNet" not in code and "Zhou" not in code


@pytest.mark.long
def test_the_detector_is_right():
    """Trains the detector, unless the user's cache has it, and counts its errors on scenes that it was not trained on."""
    images, labels = rendered(2000, 32, first=10**6)
    found = [scenes.attributes(scenes.sample_scene(SEED, 10**6 + row)) for row in range(2000)]
    shown = Shown.of(load_features("scenes", "cpu")(images, batch=100))
    shares = {
        name: (hits & counted).double().sum() / counted.double().sum()
        for name, (hits, counted) in right(shown, Named.of(found)).items()
    }
    assert all(shares[f"{name}-right"] >= 0.94 for name in ("number", "color", "shape", "relation"))
    assert shares["all-right-one"] >= 0.97 and shares["all-right-two"] >= 0.88
    assert (shown.kind == labels.kind).double().mean() >= 0.94
    assert ((shown.hue - labels.hue + 0.5) % 1 - 0.5).abs().median() < 1 / 24
