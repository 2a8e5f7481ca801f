"""Reads checkpoints, and writes them atomically.

    RUN/checkpoints/
      latest                        text: the name of the newest committed checkpoint, replaced by one rename
      images-000001280/             a committed checkpoint, which one rename made visible
        generator.safetensors       complete fp32 weights by name: `generator.*`, `text_g.*`
        discriminator.safetensors   `discriminator.*`, `text_d.*`
        text.safetensors            `text.*` (text.mode=shared only)
        ema.safetensors             the moving average of the generator and of its text encoder
        optimizer-*.safetensors     the optimizers' moments, one file per network
        state.json                  images seen, counters, the size and SHA-256 of every other file, and its own SHA-256
      .claim-*/                     the lease (lease.py), with the checkpoints that its process writes or deletes

Tensors are gathered before they are written, so a run can resume with another world size, ZeRO stage or precision. All
random numbers are functions of (seed, images seen), so no random state is stored. Nothing here uses pickle.

`save` writes into a staging folder, syncs each file and the folder, renames the folder, syncs its parent, replaces
`latest`, and deletes the expired checkpoints. A process that is killed between any two of these steps leaves either the
old or the new state. A process that lost the lease can change nothing, because each rename starts or ends in the
lease's folder, which no longer exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.checkpoint.lease import Lease
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
    """A committed checkpoint; `state` is the content of its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def images(self) -> int:
        """Images seen at the time of the checkpoint."""
        return int(self.state["images"])

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors (fp32, CPU) of `STEM.safetensors`. Raises CheckpointError when the file cannot be read."""
        from safetensors.torch import load_file

        path = self.folder / f"{stem}.safetensors"
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises undocumented exceptions
            raise CheckpointError(
                f"{path}: cannot be read ({error}).\n"
                f"Delete the folder {self.folder.name} to resume from the previous checkpoint."
            ) from error


def folder_name(images: int) -> str:
    """The name of the checkpoint at `images` seen, such as `images-000001280`, and the stem of files about it."""
    return f"images-{images:09d}"


def images_in(name: str) -> int | None:
    """The number of images seen, as the name of a checkpoint states it; None if `name` is not the name of a
    checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def folder_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def committed(run: Path) -> list[Path]:
    """Folders of the committed checkpoints, sorted by images seen."""
    root = folder_of(run)
    return [root / folder_name(images) for images in _committed(root)]


def newest_images(run: Path) -> int:
    """Images seen at the newest committed checkpoint, as its name states; 0 without checkpoints."""
    return max(_committed(folder_of(run)), default=0)


def _committed(root: Path) -> list[int]:
    names = os.listdir(root) if root.is_dir() else []
    return sorted(images for name in names if (images := images_in(name)) is not None)


def save(
    lease: Lease, images: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: Retention
) -> Path:
    """Commit a checkpoint under a run's lease and apply retention; returns the checkpoint's folder.

    `files` maps a stem (`generator`) to fp32 CPU tensors by name. An intact checkpoint of the same `images` is kept,
    because its content is the same. Raises CheckpointError if the checkpoint cannot be written (disk full, no
    permission), and Superseded if another process holds the lease. Both errors leave earlier checkpoints unchanged.
    """
    target = lease.root / folder_name(images)
    about = {"format": FORMAT, "images": images, **state}
    with _writing_errors(lease, images):
        try:
            open_checkpoint(target)
        except CheckpointError:
            _commit(lease, target, lambda staging: _write(staging, files, about))
        _point_latest(lease, target.name)
        for expired in keep.given(state).expired(_committed(lease.root)):
            lease.remove(lease.root / folder_name(expired))
    return target


def rewind(lease: Lease, limits: Sequence[int], changes: Mapping[str, Any]) -> Checkpoint | None:
    """Make an earlier checkpoint the newest one of the run, and delete all later ones.

    It is the newest intact checkpoint of at most `limits[0]` images seen; without one, of at most `limits[1]`, and so on.
    Returns it, after replacing the entries of its state that `changes` names. Without such a checkpoint, returns None
    and only deletes those beyond the last limit. A process that is killed in between leaves whole checkpoints, of which
    the newest or `latest` is one that the run had reached. Raises CheckpointError and Superseded as `save` does.
    """
    with _writing_errors(lease, limits[0]):
        found = next(filter(None, (_newest_intact(lease.root, limit) for limit in limits)), None)
        if found is not None:
            _point_latest(lease, found.folder.name)
        end = found.images if found else limits[-1]
        for later in [count for count in _committed(lease.root) if count > end]:
            lease.remove(lease.root / folder_name(later))
        if found is not None:
            found = Checkpoint(found.folder, {**found.state, **changes})
            _replace(lease, STATE, seal(found.state), found.folder)
    return found


def _newest_intact(root: Path, images: int) -> Checkpoint | None:
    for count in reversed(_committed(root)):
        if count <= images:
            with contextlib.suppress(CheckpointError):
                return open_checkpoint(root / folder_name(count))
    return None


def adopt(lease: Lease, images: int, fill: Callable[[Path], None]) -> Path:
    """Commit a checkpoint that `fill` writes, such as a download, as the newest checkpoint; returns its folder.

    `fill(folder)` writes and checks the complete checkpoint in `folder`; an exception of `fill` leaves the run
    unchanged. Replaces a damaged checkpoint of the same `images`. Raises CheckpointError and Superseded like `save`.
    """
    target = lease.root / folder_name(images)
    with _writing_errors(lease, images):
        _commit(lease, target, fill)
        _point_latest(lease, target.name)
    return target


def abandoned(images: Iterable[int], state: Mapping[str, Any]) -> set[int]:
    """Those of the checkpoints at `images` that the run with the newest checkpoint `state` has left behind: training
    diverged after them, and went back to the checkpoint of `state` (training/health.py records this there)."""
    divergences = state.get("divergences") or [{"at": -1}]
    return {count for count in images if int(state["images"]) < count <= divergences[-1]["at"]}


@dataclass(frozen=True)
class Retention:
    """The rule by which a run keeps checkpoints.

    A run keeps the newest `last` checkpoints, the first checkpoint at or past each multiple of `every_images`, the
    checkpoint at `best` images seen, and the newest checkpoint of at most `healthy` images seen (-1: unknown). While a
    sign of divergence holds (`suspicious`), it keeps all, because the newest ones may be useless.
    """

    last: int = 2
    every_images: int = 0
    best: int = -1
    healthy: int = -1
    suspicious: bool = False

    def given(self, state: Mapping[str, Any]) -> Retention:
        """A copy with the other fields from the `state` of a checkpoint, into which training/validation.py and
        training/health.py wrote them."""
        best, health = (state.get("evaluation") or {}).get("best"), state.get("health") or {}
        suspicious, healthy = health.get("since") is not None, int(health.get("healthy", -1))
        return replace(self, best=int(best["images"]) if best else -1, healthy=healthy, suspicious=suspicious)

    def expired(self, images: Iterable[int]) -> list[int]:
        """The numbers in `images` whose checkpoints are to be deleted, ascending."""
        ordered = sorted(images)
        if self.suspicious:
            return []
        kept = {*ordered[-max(1, self.last) :], self.best, *[count for count in ordered if count <= self.healthy][-1:]}
        if self.every_images > 0:
            milestones = {count // self.every_images: count for count in reversed(ordered)}  # the first at each
            kept.update(count for milestone, count in milestones.items() if milestone > 0)
        return [count for count in ordered if count not in kept]


def load_latest(run: Path, *, warn: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The checkpoint that `latest` names if intact, otherwise the newest intact checkpoint; None without checkpoints.

    Skips damaged checkpoints with warnings that name the files. Raises CheckpointError if all checkpoints are damaged.
    """
    root, latest = folder_of(run), ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        latest = (root / LATEST).read_text(encoding="utf-8").strip()
    folders = committed(run)[::-1]
    folders.sort(key=lambda folder: folder.name != latest)  # stable: `latest`, then the newest checkpoints
    for folder in folders:
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            warn(f"skipped a damaged checkpoint: {error}")
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints under {root} is intact.\n"
            "Restore a checkpoint from a copy, or start a new run in another folder."
        )
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify its sizes and SHA-256. Raises CheckpointError if a file is missing or differs."""
    try:
        data = (folder / STATE).read_bytes()
        if (version := json.loads(data)["format"]) != FORMAT:
            raise CheckpointError(f"{folder}: format {version}, but this version reads format {FORMAT}.")
        state = unseal(data)
        files = {name: (about["bytes"], about["sha256"]) for name, about in state["files"].items()}
        images = int(state["images"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE}: missing or unreadable ({error}).") from error
    if images_in(folder.name) not in (images, None):
        raise CheckpointError(f"{folder / STATE}: damaged: states {images:,} images, unlike the folder's name.")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing.")
        if path.stat().st_size != size or file_sha256(path) != sha256:
            raise CheckpointError(f"{path}: does not have its saved size and checksum.")
    return Checkpoint(folder, state)


def seal(state: Mapping[str, Any]) -> bytes:
    """The content of state.json: `state` together with the SHA-256 of `state`."""
    return json.dumps({**state, _SEAL: _state_sha256(json.loads(json.dumps(state)))}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The inverse of `seal`: the argument `state`. Raises ValueError if the checksum differs."""
    state = json.loads(data)
    if not isinstance(state, dict) or state.pop(_SEAL, None) != _state_sha256(state):
        raise ValueError("the content does not have its saved checksum")
    return state


def _state_sha256(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _writing_errors(lease: Lease, images: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if lease.broken():
            raise lease.error() from error
        raise CheckpointError(
            f"checkpoint at {images:,} images could not be written to {lease.root}: {error.strerror or error}.\n"
            "Earlier checkpoints are unchanged. Free space or correct the permissions."
        ) from error


def _commit(lease: Lease, target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a staging folder, sync it and rename it to `target`. Deletes the staging folder after an exception."""
    staging = lease.staging()
    try:
        fill(staging)
        for path in (*staging.iterdir(), staging):
            fsync(path)
        if target.exists():
            lease.remove(target)
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync(lease.root)


def _write(staging: Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    from safetensors.torch import save as to_bytes

    listed = {}
    for stem, tensors in files.items():
        name = f"{stem}.safetensors"
        data = to_bytes({key: value.contiguous() for key, value in tensors.items()}, metadata={"format": "pt"})
        write_synced(staging / name, [data])
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_synced(staging / STATE, [seal({**state, "files": listed})])


def _point_latest(lease: Lease, name: str) -> None:
    _replace(lease, LATEST, f"{name}\n".encode(), lease.root)


def _replace(lease: Lease, name: str, data: bytes, folder: Path) -> None:
    """Write a file of `folder` by one rename out of the lease's folder."""
    write_synced(lease.folder / name, [data])
    os.replace(lease.folder / name, folder / name)
    fsync(folder)
