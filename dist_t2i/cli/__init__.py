"""The commands. Each command is a module with a function `main()`; tools/*.py run the commands from a checkout."""

import importlib
import sys
from typing import NoReturn

from dist_t2i.errors import run_command


def run(command: str) -> NoReturn:
    """Run `main()` of dist_t2i.cli.COMMAND and exit with the status of `main`, or with 130 after Ctrl-C."""
    try:
        sys.exit(run_command(importlib.import_module(f"dist_t2i.cli.{command}").main))
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
