"""Weights & Biases, when it is asked for. It may fail, be slow or be unreachable: the run goes on without it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from dist_t2i.utils.processes import signals_blocked

ID_FILE = "wandb_id.txt"
Mode = Literal["disabled", "offline", "online"]


class WandbSink:
    """One W&B run per run folder: resumed runs go on under the id that the folder keeps.

    `warn` gets a line when something fails; after that nothing more is sent.
    """

    def __init__(self, folder: Path, mode: Mode, project: str, name: str, config: Mapping, warn: Callable[[str], None]):
        self._warn = warn
        self._run: Any = None
        try:
            self._run = self._start(folder, mode, project, name, config)
        except Exception as error:  # whatever W&B raises, training is worth more
            self._fail(error)

    def _start(self, folder: Path, mode: Mode, project: str, name: str, config: Mapping[str, Any]) -> Any:
        import wandb

        identity = folder / ID_FILE
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        with signals_blocked():  # its service process must not die of a signal that asks us to save
            run = wandb.init(
                dir=folder,
                project=project,
                name=name,
                id=identity.read_text(encoding="utf-8").strip(),
                resume="allow",
                mode=self._reachable(mode),
                config=dict(config),
                settings=wandb.Settings(
                    init_timeout=30, finish_timeout=20, console="off", silent=True, disable_git=True
                ),
            )
        run.define_metric("images")
        run.define_metric("*", step_metric="images")
        return run

    def _reachable(self, mode: Mode) -> Mode:
        """`mode`, or `offline` where online is out of reach."""
        import wandb

        if mode != "online":
            return mode
        try:
            if wandb.login(prompt=False):
                return "online"
            reason = "no API key: run `wandb login` or set WANDB_API_KEY"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self._warn(f"W&B is out of reach ({reason}). Kept in the run folder; `wandb sync` sends it later.")
        return "offline"

    def log(self, images: int, values: Mapping[str, Any]) -> None:
        """Send one report: numbers, or the `Path` of a PNG."""
        if self._run is None:
            return
        try:
            import wandb

            sent = {
                name: wandb.Image(str(value)) if isinstance(value, Path) else value for name, value in values.items()
            }
            self._run.log({"images": images, **sent})
        except Exception as error:
            self._fail(error)

    def close(self, exit_code: int) -> None:
        """End the session; 0 also for a run that was stopped to go on later."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._fail(error)
        self._run = None

    def _fail(self, error: Exception) -> None:
        self._run = None
        self._warn(f"W&B: {type(error).__name__}: {error}. The run goes on without it.")
