"""Remote reads in a process of their own."""

import subprocess
import sys

from ranks import ROOT

AFTER_A_CLIENT = """
import obstore
from obstore.store import from_url

from dist_t2i.storage.shard_file import read_file
from dist_t2i.storage.clients import StorageOptions

if __name__ == "__main__":
    URL = "http://127.0.0.1:9"
    try:
        obstore.get(from_url(URL, client_options={"allow_http": True}, retry_config={"max_retries": 0}), "set")
    except Exception:
        print("a client was used")
    try:
        read_file(f"{URL}/set", StorageOptions(retry_seconds=0.1))
    except OSError as error:
        print(error)
"""


def test_a_process_that_has_used_a_client_of_its_own_reads_too(tmp_path):
    """The reader of such a process is not forked, because a forked reader would wait for locks forever."""
    program = tmp_path / "program.py"
    program.write_text(AFTER_A_CLIENT)
    command = [sys.executable, "-W", "ignore", str(program)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[0] == "a client was used" and "the connection was refused" in said.stdout
