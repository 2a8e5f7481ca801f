"""Probes and neighbors: on vectors with known results, and by the command on tiny models of every text mode."""

import importlib
import json

import pytest
import torch
from PIL import Image

from dist_t2i.data.shard_set import open_set
from dist_t2i.errors import run_command
from dist_t2i.eval.skin_tones import tone_of
from dist_t2i.eval.studies import embeddings, probes
from models_on_disk import write_run, write_tone_set
from pictures import make_set


def test_a_probe_finds_what_is_there_and_nothing_else():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 16, generator=random)
    marked = noise + 4 * torch.nn.functional.one_hot(labels, 16)
    for vectors, least, most in ((marked, 0.95, 1.0), (noise, 0.15, 0.55)):
        found = probes.probe(vectors[:200], labels[:200], vectors[200:], 3)
        assert least <= (found == labels[200:]).double().mean() <= most


def test_bag_of_words():
    train, test = probes.bag_of_words(["red apple", "blue bar"], ["apple, red!", "green pear"])
    assert train.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]] and test.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


def test_nearest_and_plane():
    vectors = torch.tensor([[0.0, 0.0, 5.0], [0.1, 0.0, 5.0], [4.0, 1.0, 5.0], [4.2, 1.0, 5.0]])
    assert probes.nearest(vectors, 1).flatten().tolist() == [1, 0, 3, 2]
    places, shares = probes.plane(vectors)
    assert places.shape == (4, 2) and sum(shares) == pytest.approx(1)
    assert torch.cdist(places, places) == pytest.approx(torch.cdist(vectors.double(), vectors.double()), abs=1e-6)


def test_explained_variance():
    random = torch.Generator().manual_seed(4)
    labels = torch.arange(60) % 20
    noise = torch.randn(60, 8, generator=random)
    assert abs(probes.explained(noise, labels)) < 0.15  # the plain ratio would be a third
    centres = torch.randn(20, 8, generator=random)
    assert probes.explained(centres[labels], labels) == pytest.approx(1)
    mixed = centres[labels] - centres[labels].mean(0) + noise
    assert 0.3 < probes.explained(mixed, labels) < 0.7
    assert torch.tensor(probes.explained(noise[:20], labels[:20])).isnan()


def test_alike_does_not_mind_rotation_and_scale():
    a = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    turned, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))
    assert probes.alike(a, 3 * a @ turned) == pytest.approx(1)
    assert probes.alike(a, torch.randn(50, 6, generator=torch.Generator().manual_seed(3))) < 0.5


@pytest.mark.parametrize(
    ("caption", "tone", "gender", "thing"),
    [
        ("woman pilot light skin tone", "light", "female", "pilot"),
        ("men with bunny ears dark skin tone", "dark", "male", "with bunny ears"),
        ("person medium-dark skin tone", "medium-dark", "neither", "only a person"),
        ("woman and man holding hands", "", "", ""),
        ("red apple", "", "", ""),
    ],
)
def test_what_a_caption_says(caption, tone, gender, thing):
    assert (tone_of(caption), embeddings.gender_of(caption)) == (tone, gender)
    assert embeddings._objects(caption) == thing


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["embeddings.py", *map(str, words)])
    return run_command(importlib.import_module("dist_t2i.cli.embeddings").main)


@pytest.fixture(scope="module")
def toned(tmp_path_factory):
    return write_tone_set(tmp_path_factory.mktemp("sets") / "set")


@pytest.mark.parametrize("mode", ["dual", "shared", "frozen"])
def test_a_page_for_every_text_mode(mode, toned, tmp_path, monkeypatch, capsys):
    data, more = open_set(toned), [f"text.mode={mode}"]
    if mode == "frozen":
        from safetensors.torch import save_file

        captions = [
            data.samples(split)[i].captions[0] for split in data.splits for i in range(len(data.samples(split)))
        ]
        table = tmp_path / "table.safetensors"
        random = torch.randn(len(captions), 8, generator=torch.Generator().manual_seed(0))
        save_file({"vectors": random}, table, metadata={"captions": json.dumps(captions)})
        more.append(f"text.frozen={table}")
    run = write_run(tmp_path / "run", f"data.train={toned}", *more, words=data.tokenizer)
    assert command(monkeypatch, "--run", run) == 0
    assert "skin tone:" in capsys.readouterr().out
    found = json.loads((run / "embeddings" / "embeddings.json").read_text())
    names = {"dual": ["S_G", "S_D"], "shared": ["shared"], "frozen": ["given"]}[mode]
    assert found["embeddings"] == names and (found["cka"] is None) == (len(names) == 1)
    (tone,) = (one for one in found["probes"] if one["name"] == "skin tone")
    assert set(tone["accuracy"]) == {*names, "bag of words", "untrained encoder"} and tone["classes"] == [
        "dark",
        "light",
    ]
    assert tone["accuracy"]["bag of words"][0] == 1.0 and 0 <= tone["chance"] <= 1
    for value, low, high in tone["accuracy"].values():
        assert 0 <= low <= value <= high <= 1
    near = found["neighbours"][names[0]]
    assert near and all(query not in others for query, others in near.items())
    assert ("skin" in near) == (mode != "frozen")  # a table has vectors of captions, not of words
    page = (run / "embeddings" / "index.html").read_text()
    assert "data:image/png" in page and 'src="http' not in page
    assert Image.open(run / "embeddings" / "map.png").width > 500


def test_a_set_without_tones_has_the_probes_that_apply(tmp_path, monkeypatch, capsys):
    data = make_set(tmp_path, 60)
    run = write_run(tmp_path / "run", f"data.train={data.folder}", words=data.tokenizer)
    assert command(monkeypatch, "--run", run, "--out", tmp_path / "page", "--words", "picture") == 0
    assert "page: " in capsys.readouterr().out
    found = json.loads((tmp_path / "page" / "embeddings.json").read_text())
    assert "skin tone" not in [one["name"] for one in found["probes"]]
    assert "picture" in found["neighbours"]["S_G"] and found["held_out"]["split"] == "a fifth of the captions"


def test_mistakes(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    few = make_set(tmp_path / "few", 4)
    for words, said in (
        (("--run", tmp_path / "nowhere"), "does not exist"),
        (("--run", run), "--data"),
        (("--run", run, "--data", few.folder), "too few captions"),
    ):
        assert command(monkeypatch, *words) == 2
        assert said in capsys.readouterr().err
