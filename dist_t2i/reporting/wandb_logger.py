"""Weights & Biases, if `report.wandb` enables it. Training continues when W&B fails, is slow or cannot be reached."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_t2i.config.sections import ReportConfig
from dist_t2i.utils.processes import signals_blocked

ID_FILE = "wandb_id.txt"
SETTINGS: dict[str, Any] = {
    "init_timeout": 30,
    "finish_timeout": 20,
    "console": "off",
    "silent": True,
    "disable_git": True,
}
"""Fields of wandb.Settings. Another version of wandb may lack a field, so a test checks the installed version."""


class WandbLogger:
    """One W&B run per run folder: a resumed run continues under the ID in RUN/wandb_id.txt."""

    def __init__(
        self, folder: Path, report: ReportConfig, name: str, config: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._run: Any = None
        with self._guarded():
            import wandb

            id_file = folder / ID_FILE
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
            with signals_blocked():  # a stop signal must not kill W&B's service process
                run = wandb.init(
                    dir=folder,
                    project=report.wandb_project,
                    name=name,
                    id=id_file.read_text(encoding="utf-8").strip(),
                    resume="allow",
                    mode="online" if report.wandb == "online" and self._reachable() else "offline",
                    config=dict(config),
                    settings=wandb.Settings(**SETTINGS),
                )
            run.define_metric("images")
            run.define_metric("*", step_metric="images")
            self._run = run

    def _reachable(self) -> bool:
        import wandb

        try:
            if wandb.login(prompt=False):
                return True
            reason = "no API key: run `wandb login` or set WANDB_API_KEY"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self._warn(f"W&B cannot be used ({reason}). Logging into the run folder; `wandb sync` uploads the log later.")
        return False

    def log(self, images: int, values: Mapping[str, Any]) -> None:
        """Log one report: numbers, or the `Path` of a PNG."""
        if self._run is None:
            return
        with self._guarded():
            import wandb

            pictures = {name: wandb.Image(str(value)) for name, value in values.items() if isinstance(value, Path)}
            self._run.log({"images": images, **values, **pictures})

    def close(self, exit_code: int) -> None:
        """End the W&B run. `exit_code` is 0 for a finished run, and for a stopped run that can be resumed."""
        if self._run is not None:
            with self._guarded():
                self._run.finish(exit_code=exit_code)
            self._run = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns an exception of W&B into a warning and ends the logging, so that the training continues."""
        try:
            yield
        except Exception as error:
            self._run = None
            self._warn(f"W&B: {type(error).__name__}: {error}. Training continues without it.")
