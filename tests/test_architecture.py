"""Imports point down the ladder of docs/architecture.md: none up, sideways or in a circle; the picture is current."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from architecture import (
    FOLDERS,
    PICTURE,
    ROOT,
    arrows,
    circles,
    files_of_packages,
    imports,
    imports_name,
    modules,
    picture,
    violations,
)

MOST_FILES, MOST_ARROWS = 12, 100


def test_imports_point_down():
    assert violations(imports()) == []


def test_only_the_top_takes_the_whole_configuration():
    """All other modules take the sections that they read."""
    allowed = ("config/", "publish/", "ablation/", "cli/", "train.py", "training/setup.py", "inference/model_files.py")
    allowed = (*(f"dist_t2i/{part}" for part in allowed), "slurm/submission.py", "tools/")
    takers = {path.as_posix() for path in modules().values() if imports_name(path, "dist_t2i.config", "Config")}
    assert "dist_t2i/training/setup.py" in takers
    assert [path for path in sorted(takers) if not path.startswith(allowed)] == []


def test_no_modules_import_each_other():
    assert circles(imports()) == []


def test_packages_are_small_and_few_import_each_other():
    assert {folder: count for folder, count in files_of_packages().items() if count > MOST_FILES} == {}
    assert len(arrows(imports())) <= MOST_ARROWS
    root = [path.name for path in modules().values() if path.parent == Path("dist_t2i")]
    assert sorted(root) == ["__init__.py", "errors.py", "train.py"]


def test_the_picture_of_the_documents_is_current():
    """`python tests/support/architecture.py` writes it."""
    assert PICTURE.read_text(encoding="utf-8") == picture(arrows(imports()))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the project's code, into which tests insert imports."""
    folder = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


PLANTED = {
    "up": ("dist_t2i/data/images.py", "from dist_t2i.training.trainer import Trainer", "data may not import training"),
    "up, lazily": (
        "dist_t2i/utils/files.py",
        "def later():\n    from dist_t2i import config",
        "utils may not import config",
    ),
    "sideways": ("dist_t2i/reporting/meter.py", "import dist_t2i.data.images", "reporting may not import data"),
    "into the commands": ("slurm/attempts.py", "from dist_t2i.cli import train", "slurm may not import cli"),
    "an engine": (
        "dist_t2i/publish/export.py",
        "from dist_t2i.distributed import engine",
        "only training, tools may import dist_t2i.distributed.engine",
    ),
    "more than collectives": (
        "dist_t2i/losses/functional.py",
        "from dist_t2i.distributed.launch import has_gpu",
        "losses may import dist_t2i.distributed.collectives at most",
    ),
    "a library": ("dist_t2i/data/images.py", "import wandb", "only reporting may import wandb"),
    "a new place": ("dist_t2i/elsewhere/new.py", "import dist_t2i.errors", "elsewhere is on no step of the ladder"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_import_is_found(name: str, copy: Path):
    file, line, message = PLANTED[name]
    path = copy / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text((before or "") + "\n\n" + line + "\n", encoding="utf-8")
    try:
        found = violations(imports(copy))
        assert any(line.startswith(file) and message in line for line in found), found
    finally:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert not any(line.startswith(file) for line in violations(imports(copy)))


def test_a_planted_circle_is_found(copy: Path):
    path = copy / "dist_t2i" / "utils" / "files.py"
    before = path.read_text(encoding="utf-8")
    (copy / "dist_t2i" / "utils" / "one.py").write_text("def later():\n    import dist_t2i.utils.files\n")
    path.write_text(before + "\n\nimport dist_t2i.utils.one\n", encoding="utf-8")
    try:
        assert ["dist_t2i.utils.files", "dist_t2i.utils.one"] in circles(imports(copy))
    finally:
        path.write_text(before, encoding="utf-8")
        (copy / "dist_t2i" / "utils" / "one.py").unlink()
