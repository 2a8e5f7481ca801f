"""Starts one rank of a job through submitit, with this copy of the code first on the module search path.

`python -m submitit...` would instead import the code from the folder in which the job was submitted. The code there may
have changed since.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from submitit.core.submission import submitit_main  # noqa: E402

if __name__ == "__main__":
    submitit_main()
