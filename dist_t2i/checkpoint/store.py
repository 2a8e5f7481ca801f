"""Checkpoints that exist whole or not at all.

    RUN/checkpoints/
      latest                        text: the name of the newest committed checkpoint; replaced in one step
      images-000001280/             committed: it came into being by one rename
        generator.safetensors       fp32 weights, whole, by name: `generator.*`, `text_g.*`
        discriminator.safetensors   `discriminator.*`, `text_d.*`
        text.safetensors            `text.*` (text.mode=shared only)
        ema.safetensors             the moving average of the generator and the encoder that it reads
        optimizer-*.safetensors     the optimizers' moments, one file per network
        state.json                  images seen, counters, the size and SHA-256 of every other file, and its own
      .claim-*/                     of the process that may commit, see claim.py: what is being written or deleted

Tensors are gathered before they are written, so a checkpoint knows nothing of world size, ZeRO stage or precision, and
any of them can read it. Everything random in a run is a function of (seed, images seen), so images seen is all the
state that the data stream, the schedules and the noise have. Nothing here uses pickle.

Order of events in `save`: write into a staging folder, fsync each file and the folder, rename, fsync the parent,
replace `latest`, delete what retention no longer keeps (again by a rename first). A kill between any two of them leaves
either the old state or the new one. Each rename is out of or into the folder of the process's claim (claim.py), so that
one whose run was taken over by another process can change nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.checkpoint.lease import Claim
from dist_t2i.errors import CheckpointError
from dist_t2i.utils.files import file_sha256, fsync, write_synced

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
STATE = "state.json"
LATEST = "latest"
_SEAL = "sha256"
_NAME = re.compile(r"images-(\d{9,})")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `tensors(stem)` reads one of its files, `state` is what `save` was given."""

    folder: Path
    state: dict[str, Any]

    @property
    def images(self) -> int:
        """Images seen when it was saved."""
        return int(self.state["images"])

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors (fp32, CPU) of `STEM.safetensors`. Raises CheckpointError when it is missing or unreadable."""
        from safetensors.torch import load_file

        path = self.folder / f"{stem}.safetensors"
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own, undocumented types
            raise CheckpointError(
                f"{path}: cannot be read ({error}).\nDelete the folder {self.folder.name} to go on from the one before."
            ) from error


def folder_name(images: int) -> str:
    """The name of the checkpoint at `images` seen: `images-000001280`. Files about a checkpoint have it as their stem."""
    return f"images-{images:09d}"


def images_in(name: str) -> int | None:
    """Images seen by the name of a checkpoint, None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def committed(run: Path) -> list[Path]:
    """Folders of the committed checkpoints, by images seen."""
    root = folder_of(run)
    return [root / folder_name(images) for images in _committed(root)]


def newest_images(run: Path) -> int:
    """Images seen at the newest committed checkpoint, by its name; 0 without one."""
    return max(_committed(folder_of(run)), default=0)


def _committed(root: Path) -> list[int]:
    names = os.listdir(root) if root.is_dir() else []
    return sorted(images for name in names if (images := images_in(name)) is not None)


def save(
    claim: Claim, images: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: Retention
) -> Path:
    """Commit a checkpoint under a run's claim and apply retention; returns its folder.

    `files` maps a stem (`generator`) to fp32 CPU tensors by name. An existing checkpoint of the same `images` is
    left as it is: the run is a function of images seen, so it holds the same.
    Raises CheckpointError when it cannot be written (disk full, no permission); earlier checkpoints are then untouched.
    Raises Superseded when another process has claimed the run; nothing was changed then.
    """
    root = claim.root
    target = root / folder_name(images)
    with _errors_of_writing(claim, images):
        if target.exists() and not _intact(target):
            claim.remove(target)
        if not target.exists():
            with _staged(claim) as staging:
                _write(staging, files, {"format": FORMAT, "images": images, **state})
                claim.commit(staging, target)
            fsync(root)
        _point_latest(claim, target.name)
        for expired in keep.with_best(state).expired(_committed(root)):
            claim.remove(root / folder_name(expired))
    return target


def adopt(claim: Claim, images: int, fill: Callable[[Path], None]) -> Path:
    """Commit a checkpoint that comes from elsewhere and make it the newest; returns its folder.

    `fill(folder)` puts it there, whole and checked; what it raises leaves the run as it was. A damaged one of the same
    `images` is replaced. Raises CheckpointError when it cannot be written, and Superseded as `save` does.
    """
    root = claim.root
    target = root / folder_name(images)
    with _errors_of_writing(claim, images):
        with _staged(claim) as staging:
            fill(staging)
            for path in (*staging.iterdir(), staging):
                fsync(path)
            os.chmod(staging, 0o755 & ~_umask())
            if target.exists():
                claim.remove(target)
            claim.commit(staging, target)
        fsync(root)
        _point_latest(claim, target.name)
    return target


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, those that are the first past each multiple of `every_images`, and `best`."""

    last: int = 2
    every_images: int = 0
    best: int = -1
    """Images seen of the one with the best scores; -1: none is known."""

    def with_best(self, state: Mapping[str, Any]) -> Retention:
        """The same, with the best one that a checkpoint's state names (periodic.py)."""
        best = (state.get("evaluation") or {}).get("best")
        return replace(self, best=int(best["images"])) if best else self

    def expired(self, images: Iterable[int]) -> list[int]:
        """Of checkpoints at these image counts (ascending), the ones to delete."""
        ordered = sorted(images)
        kept = {*ordered[-max(1, self.last) :], self.best}
        if self.every_images > 0:
            milestones: set[int] = set()
            for count in ordered:
                milestone = count // self.every_images
                if milestone > 0 and milestone not in milestones:
                    milestones.add(milestone)
                    kept.add(count)
        return [count for count in ordered if count not in kept]


def load_latest(run: Path, *, warn=lambda message: None) -> Checkpoint | None:
    """The newest checkpoint whose files are all there and have their checksums, or None when there is none at all.

    A damaged one is passed over with a `warn`ing that names the file. Raises CheckpointError when every one is damaged.
    """
    folders = list(reversed(committed(run)))
    pointer = _read_latest(folder_of(run))
    folders.sort(key=lambda folder: folder.name != pointer)  # stable: `latest` first, then the newest
    for folder in folders:
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints under {folder_of(run)} is intact.\n"
            "Restore one from a copy, or start again in another folder."
        )
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint with every file's size and SHA-256 checked. Raises CheckpointError naming the file that differs."""
    try:
        data = (folder / STATE).read_bytes()
        if (version := json.loads(data)["format"]) != FORMAT:
            raise CheckpointError(f"{folder}: format {version}, but this version reads format {FORMAT}.")
        state = unseal(data)
        listed = {name: (about["bytes"], about["sha256"]) for name, about in state["files"].items()}
        images = int(state["images"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE}: missing or unreadable ({error}).") from error
    if images_in(folder.name) not in (images, None):
        raise CheckpointError(f"{folder / STATE}: damaged, it is of {images:,} images.")
    for name, (size, sha256) in listed.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing.")
        if path.stat().st_size != size or file_sha256(path) != sha256:
            raise CheckpointError(f"{path}: does not have the size and checksum it was saved with.")
    return Checkpoint(folder, state)


def seal(state: Mapping[str, Any]) -> bytes:
    """`state` as state.json holds it: with the SHA-256 of all it says."""
    return json.dumps({**state, _SEAL: _state_sha256(json.loads(json.dumps(state)))}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """What `seal` was given. Raises ValueError when it is not what was written."""
    found = json.loads(data)
    if not isinstance(found, dict) or found.pop(_SEAL, None) != _state_sha256(found):
        raise ValueError("it does not have the checksum it was saved with")
    return found


def _state_sha256(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# ---- the steps of a save ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staged(claim: Claim) -> Iterator[Path]:
    """A staging folder, to be committed inside; gone when that fails."""
    staging = claim.staging()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def _errors_of_writing(claim: Claim, images: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if claim.broken():
            raise claim.error() from error
        raise CheckpointError(
            f"checkpoint at {images:,} images could not be written to {claim.root}: {error.strerror or error}.\n"
            "Earlier checkpoints are untouched. Free space or mend the permissions."
        ) from error


def _write(staging: Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    from safetensors.torch import save as to_bytes

    listed = {}
    for stem, tensors in files.items():
        name = f"{stem}.safetensors"
        data = to_bytes({key: value.contiguous() for key, value in tensors.items()}, metadata={"format": "pt"})
        write_synced(staging / name, [data])
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_synced(staging / STATE, [seal({**state, "files": listed})])
    fsync(staging)
    os.chmod(staging, 0o755 & ~_umask())


def _point_latest(claim: Claim, name: str) -> None:
    write_synced(claim.folder / LATEST, [f"{name}\n".encode()])
    claim.commit(claim.folder / LATEST, claim.root / LATEST)
    fsync(claim.root)


def _read_latest(root: Path) -> str:
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _intact(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
