"""Exports: their files, safe loading, and errors for every kind of damage."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_t2i
from dist_t2i.errors import UserError
from dist_t2i.publish.export import export
from dist_t2i.utils.files import file_sha256
from models_on_disk import write_run


@pytest.fixture
def exported(tmp_path):
    return export(write_run(tmp_path / "run"), tmp_path / "model")


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def relist(folder, name):
    """Writes the current size and hash of a file into model.json, as an attacker would."""
    about = json.loads((folder / "model.json").read_text())
    about["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    (folder / "model.json").write_text(json.dumps(about))


def test_what_an_export_holds(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("README.md", "config.yaml", "discriminator.safetensors", "generator.safetensors"),
        *("model.json", "samples.png", "tokenizer.json"),
    }
    prefixes = {name.split(".")[0] for name in load_file(exported / "generator.safetensors")}
    assert prefixes == {"generator", "text_g"}
    card = (exported / "README.md").read_text()
    assert "dist_t2i.load" in card and "64 images" in card


def test_nothing_of_the_machine_is_in_it(tmp_path):
    run = write_run(tmp_path / "run", f"data.train={tmp_path / 'set'}", f"run.folder={tmp_path / 'run'}")
    folder = export(run, tmp_path / "model")
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_second_export_needs_force_and_foreign_folders_stay(tmp_path, exported):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="--force"):
        export(run, exported)
    export(run, exported, replace=True)
    dist_t2i.load(exported)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not an exported model"):
        export(run, tmp_path / "mine", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model", "run"]


def test_an_export_of_an_export_is_the_same_model(tmp_path, exported):
    again = export(exported, tmp_path / "again")
    assert dist_t2i.load(again).files.sha256() == dist_t2i.load(exported).files.sha256()


@pytest.mark.slow
def test_loading_imports_no_deepspeed_and_runs_in_a_fresh_process(exported):
    code = (
        "import sys, dist_t2i; assert 'torch' not in sys.modules;"
        f"m = dist_t2i.load({str(exported)!r}, 'cpu'); p = m.generate(['red apple']); m.score(p, ['red apple']);"
        "bad = {'deepspeed', 'wandb', 'matplotlib', 'webdataset'} & set(sys.modules); assert not bad, bad; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize(
    "name", ["generator.safetensors", "discriminator.safetensors", "tokenizer.json", "config.yaml"]
)
def test_a_planted_pickle_is_refused_and_never_run(tmp_path, exported, name):
    (exported / name).write_bytes(pickle.dumps(Bomb(tmp_path / "burnt")))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        dist_t2i.load(exported)
    relist(exported, name)
    with pytest.raises(UserError):
        dist_t2i.load(exported)
    assert not (tmp_path / "burnt").exists()


def test_pickles_beside_it_are_not_looked_at(tmp_path, exported):
    for name in ("pytorch_model.bin", "generator.pt", "model.pkl"):
        (exported / name).write_bytes(pickle.dumps(Bomb(tmp_path / "burnt")))
    dist_t2i.load(exported)
    assert not (tmp_path / "burnt").exists()


def test_yaml_and_json_cannot_construct_objects(tmp_path, exported):
    config = exported / "config.yaml"
    config.write_text(f"run: !!python/object/apply:builtins.open [{tmp_path / 'burnt'}, w]\n")
    relist(exported, "config.yaml")
    with pytest.raises(UserError, match="export"):
        dist_t2i.load(exported)
    assert not (tmp_path / "burnt").exists()


@pytest.mark.parametrize(
    "name", ["generator.safetensors", "discriminator.safetensors", "tokenizer.json", "config.yaml"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_files_are_named(exported, name, damage):
    path = exported / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        dist_t2i.load(exported)
    assert "export" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "damaged"), ("[]", "damaged"), ('{"format": 99, "images": 1, "files": {}}', "format 99"), ("{}", "damaged")],
)
def test_broken_model_json(exported, text, said):
    (exported / "model.json").write_text(text)
    with pytest.raises(UserError, match=said):
        dist_t2i.load(exported)


def test_weights_that_do_not_fit_are_named(tmp_path, exported):
    path = exported / "generator.safetensors"
    whole = load_file(path)
    first = "text_g.embedding.weight"
    cases = {
        f"{first}: missing": {k: v for k, v in whole.items() if k != first},
        "text_g.extra: unknown": whole | {"text_g.extra": torch.zeros(1)},
        f"{first}: has shape": whole | {first: whole[first][:3].clone()},
        "not finite": whole | {first: whole[first] * float("nan")},
    }
    for said, tensors in cases.items():
        save_file(tensors, path)
        relist(exported, path.name)
        with pytest.raises(UserError, match=said):
            dist_t2i.load(exported)


def test_a_configuration_of_absurd_size_allocates_nothing(exported):
    config = exported / "config.yaml"
    config.write_text(config.read_text().replace("embedding: 16", "embedding: 1000000000", 1))
    relist(exported, "config.yaml")
    with pytest.raises(UserError, match="fit the configuration"):
        dist_t2i.load(exported)


def test_extra_files_in_the_list_are_refused(exported):
    about = json.loads((exported / "model.json").read_text())
    about["files"]["../run/config.yaml"] = {"bytes": 1, "sha256": ""}
    (exported / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="a model has no such file"):
        dist_t2i.load(exported)
