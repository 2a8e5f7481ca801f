"""`checkpoint.mirror`: checkpoints are copied to a real S3 server, and runs whose folder is lost resume from the
mirror."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import Lease, acquire
from dist_t2i.checkpoint.mirror import FINISH_SECONDS, STOP_SECONDS, Mirror
from dist_t2i.checkpoint.store import Retention
from dist_t2i.config import files as config_files
from dist_t2i.config.fields import build
from dist_t2i.config.sections import Config
from dist_t2i.errors import CheckpointError, ConfigError, ExitStatus
from dist_t2i.storage.folders import open_folder
from fault_proxy import FaultProxy
from faults import Stall, Status
from object_store import S3Server, environment, without_aws
from ranks import ROOT
from runs import Run, assert_same_state, make_set, wait_for_run

URL = "s3://data/runs/mine"
FINGERPRINT = "0123"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture()
def proxy(server, monkeypatch):
    """A proxy before an empty bucket; all clients of a test use its endpoint."""
    with FaultProxy(server.endpoint) as proxy:
        for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
            monkeypatch.delenv(name)
        for name, value in (without_aws({}) | environment(proxy.endpoint)).items():
            monkeypatch.setenv(name, value)
        yield proxy
        for key in keys(server):
            server.delete(key)


def keys(server) -> list[str]:
    import obstore

    return sorted(entry["path"] for entry in obstore.list(server.store()).collect())


def mirrored(server) -> list[int]:
    """Images seen of the checkpoints that have their marker. Other checkpoints must have no files."""
    found = {int(key.split("images-")[1][:9]) for key in keys(server) if "/checkpoints/images-" in key}
    whole = {int(key.split("images-")[1][:9]) for key in keys(server) if key.endswith("/state.json")}
    assert found == whole
    return sorted(whole)


# ---- without training: the same calls, real processes, a small checkpoint ----------------------------------------------


class Small:
    """A run folder with checkpoints of a few numbers, and its mirror."""

    def __init__(self, folder: Path, url: str = URL, allow_changes: bool = False, **values):
        self.folder, self.said, self._lease = folder, [], None
        self.config: Config = build(
            {"run.folder": str(folder), "checkpoint.mirror": url, "data.retry_seconds": 1.0}
            | {name.replace("__", "."): value for name, value in values.items()}
        )
        reporter = SimpleNamespace(say=self.said.append, warn=self.said.append)
        self.mirror = Mirror(
            self.config.checkpoint,
            folder,
            config_files.dump(self.config),
            reporter,
            retry_seconds=self.config.data.retry_seconds,
            main=True,
            allow_changes=allow_changes,
        )

    def begin(self) -> Small:
        """Calls the mirror as a training run does."""
        self.mirror.look(FINGERPRINT)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(config_files.dump(self.config))
        (self.folder / "environment.json").write_text(json.dumps({"data": {"fingerprint": FINGERPRINT}}))
        (self.folder / "tokenizer.json").write_text("{}")
        self.mirror.restore(self.lease)
        return self

    @property
    def lease(self) -> Lease:
        self._lease = self._lease or acquire(self.folder / "checkpoints")
        return self._lease

    def save(self, images: int, size: int = 1000, best: int | None = None, **more) -> Path:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"images": images, "loss/d": images / 3}) + "\n")
        files = {"generator": {"w": torch.full((size,), float(images))}, "ema": {"w": torch.ones(3)}}
        keep = Retention(self.config.checkpoint.keep_last, self.config.checkpoint.keep_every_images)
        state = {"seed": 1, **more} | ({"evaluation": {"best": {"images": best, "value": 0.5}}} if best else {})
        return store.save(self.lease, images, files, state, keep=keep)

    def upload(self, *images: int, **more) -> None:
        for count in images:
            self.save(count, **more)
            self.mirror.offer(count)
            self.wait(lambda: not self.mirror.waiting)

    def wait(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said
            self.mirror.poll(0.05)
            time.sleep(0.01)

    def finish(self, status: int = ExitStatus.FINISHED) -> None:
        self.mirror.finish(finished=status == ExitStatus.FINISHED, stopping=lambda: False)

    def checkpoints(self) -> list[int]:
        return [int(folder.name[7:]) for folder in store.committed(self.folder)]

    def count_of(self, text: str) -> int:
        return sum(text in line for line in self.said)


@pytest.fixture()
def small(proxy, tmp_path):
    """Makes run folders by name, and ends their processes."""
    made = []

    def make(name: str, url: str = URL, **values) -> Small:
        made.append(Small(tmp_path / name, url, **values))
        return made[-1]

    yield make
    for one in made:
        one.mirror.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["s3", "folder"])
def test_what_goes_up_is_what_comes_down(small, tmp_path, where):
    url = URL if where == "s3" else str(tmp_path / "elsewhere" / "mirror")
    first = small("first", url).begin()
    (first.folder / "bad_samples.jsonl").write_text('{"position": 150}\n{"position": 250}\n')
    first.upload(100)
    first.save(200, size=9_000_000 if where == "s3" else 1000)  # uploaded in parts, downloaded in several requests
    first.mirror.offer(200)
    first.save(300)
    first.finish()
    second = small("second", url).begin()
    assert second.checkpoints() == [200] and second.count_of(
        "has no intact checkpoint: fetching the checkpoint at 200 images"
    )
    was, now = (contents(one.folder / "checkpoints" / "images-000000200") for one in (first, second))
    assert now == was
    assert [json.loads(line)["images"] for line in (second.folder / "metrics.jsonl").open()] == [100, 200]
    assert (second.folder / "bad_samples.jsonl").read_text() == '{"position": 150}\n'
    assert (second.folder / "checkpoints" / "latest").read_text() == "images-000000200\n"
    second.upload(300)
    assert small("third", url).begin().checkpoints() == [300]


def test_the_best_checkpoint_stays_there_as_it_does_in_the_run(small, tmp_path):
    url = str(tmp_path / "mirror")
    run = small("run", url, checkpoint__keep_last=1).begin()
    run.upload(100, 200, 300, best=200)
    there = sorted(int(path.name[7:]) for path in (tmp_path / "mirror" / "checkpoints").glob("images-*"))
    assert run.checkpoints() == there == [200, 300]


def test_a_copy_of_the_mirror_is_a_run_folder(small, tmp_path):
    url = str(tmp_path / "mirror")
    small("run", url).begin().upload(100)
    copy = shutil.copytree(url, tmp_path / "copy")
    assert store.load_latest(copy).images == 100
    assert config_files.load(copy / "config.yaml").checkpoint.mirror == url


def test_retention_is_that_of_the_run(small, server):
    values = {"checkpoint__keep_last": 2, "checkpoint__keep_every_images": 250}
    run = small("run", **values).begin()
    run.upload(100, 200, 300, 400, 500, 600)
    assert run.checkpoints() == mirrored(server) == [300, 500, 600]
    assert not run.said, run.said


def test_a_divergence_leaves_no_sick_checkpoint(small, tmp_path):
    """In the mirror as in the run folder: none is deleted while a sign holds, and the later ones after the divergence."""
    url = tmp_path / "elsewhere" / "mirror"
    run = small("run", str(url), checkpoint__keep_last=1).begin()
    run.upload(100)
    run.upload(200, 300, health={"since": 100, "healthy": 100})
    assert run.checkpoints() == [100, 200, 300] and len(store.committed(url)) == 3
    store.rewind(run.lease, [100], {"divergences": [{"at": 350}]})
    run.mirror.offer(100)
    run.wait(lambda: not run.mirror.waiting)
    assert [store.open_checkpoint(folder).images for folder in store.committed(url)] == [100]
    assert store.load_latest(url).state["divergences"] == [{"at": 350}]


def test_what_a_divergence_has_left_in_the_mirror_is_not_restored(small, tmp_path):
    """The run ended before its mirror had deleted the sick checkpoints."""
    url = tmp_path / "elsewhere" / "mirror"
    run = small("run", str(url), checkpoint__keep_last=9).begin()
    run.upload(100, 200, 400)
    run.mirror.close()
    store.rewind(run.lease, [100], {"divergences": [{"at": 400}]})
    again = small("run", str(url), checkpoint__keep_last=9).begin()
    assert again.checkpoints() == [100] and not again.said
    again.upload(150, divergences=[{"at": 400}])
    assert [int(folder.name[7:]) for folder in store.committed(url)] == [100, 150]


def test_files_come_before_the_marker_and_leave_after_it(small, proxy, server):
    run = small("run", "s3://data/order", checkpoint__keep_last=1).begin()
    run.upload(100)
    put = [r.path.removeprefix("/data/order/") for r in proxy.seen(method="PUT")]
    assert put[:4] == ["environment.json", "tokenizer.json", "config.yaml", "owner.json"]
    assert [path.endswith("/state.json") for path in put[4:]] == [False, False, False, False, True]
    removing = proxy.add(Status(403), method="POST", skip=2)  # the first makes room for the new one
    run.save(200)
    run.mirror.offer(200)
    run.wait(lambda: removing.hits)
    left = [key for key in keys(server) if "images-000000100" in key]
    assert len(left) == 4 and not any(key.endswith("/state.json") for key in left)
    proxy.clear()
    run.finish()
    assert mirrored(server) == [200]


def test_the_newest_of_those_that_wait_wins(small, proxy, server):
    proxy.add(Stall(1.0), path="*images-000000100/*", method="PUT", first=1)
    run = small("run", checkpoint__keep_last=5).begin()
    for images in (100, 200, 300):
        run.save(images)
        run.mirror.offer(images)
        run.wait(lambda: proxy.seen("*images-000000100/*", "PUT"))
    run.finish()
    assert mirrored(server) == [100, 300]


def test_what_the_run_deletes_meanwhile_is_uploaded_all_the_same(small, proxy, server):
    proxy.add(Stall(1.0), path="*images-000000100/*", method="PUT", first=1)
    run = small("run").begin()
    run.mirror.offer(int(run.save(100).name[7:]))
    run.wait(lambda: proxy.seen("*images-000000100/*", "PUT"))
    shutil.rmtree(run.folder / "checkpoints" / "images-000000100")
    run.finish()
    assert mirrored(server) == [100]
    assert small("other").begin().checkpoints() == [100]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_checkpoint_damaged_here_is_not_mirrored(small, server):
    run = small("run").begin()
    file = run.save(100) / "generator.safetensors"
    file.write_bytes(flip(file.read_bytes()))
    run.mirror.offer(100)
    run.finish()
    assert run.count_of("not mirrored") == run.count_of("generator.safetensors") == 1
    run.upload(200)
    assert mirrored(server) == [200], "what was begun is swept"


@pytest.mark.parametrize("damage", ["cut", "record", "marker", "another marker", "no marker"])
def test_a_damaged_one_is_passed_over_with_a_word(small, server, damage):
    run = small("run", checkpoint__keep_last=3).begin()
    run.upload(100, 200)
    run.mirror.close()
    name = {"record": "run/metrics.jsonl", "cut": "generator.safetensors"}
    key = f"runs/mine/checkpoints/images-000000200/{name.get(damage, 'state.json')}"
    data = server.get(key)
    if damage == "another marker":
        server.put(key, data.replace(b'"images": 200', b'"images": 300'))
    elif damage == "no marker":
        server.delete(key)
    else:
        server.put(key, data[: len(data) // 2] if damage in ("cut", "marker") else flip(data))
    other = small("other").begin()
    assert other.checkpoints() == [100]
    assert (
        other.count_of("skipped a mirrored checkpoint") == other.count_of("images-000000200") == (damage != "no marker")
    )
    assert [json.loads(line)["images"] for line in (other.folder / "metrics.jsonl").open()] == [100]
    other.save(200)
    other.mirror.offer(200)
    other.finish()
    assert small("third").begin().checkpoints() == [200], "a damaged one is replaced when the run comes there again"


def test_none_of_them_whole_is_an_error(small, server):
    run = small("run").begin()
    run.upload(100)
    run.mirror.close()
    server.delete("runs/mine/checkpoints/images-000000100/ema.safetensors")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        small("other").begin()


def test_the_newer_of_run_folder_and_mirror_is_gone_on_from(small, tmp_path):
    run = small("run", checkpoint__keep_last=5).begin()
    run.upload(100)
    shutil.copytree(run.folder, tmp_path / "backup")
    shutil.copytree(run.folder, tmp_path / "ahead")
    run.upload(200)
    run.mirror.close()
    backup = small("backup").begin()
    assert backup.checkpoints() == [100, 200] and backup.count_of("has only older checkpoints (up to 100 images)")
    ahead = small("ahead")
    ahead.save(300)
    assert ahead.begin().checkpoints() == [100, 300] and not ahead.said
    file = backup.folder / "checkpoints" / "images-000000200" / "ema.safetensors"
    good = file.read_bytes()
    file.write_bytes(flip(good))
    assert (
        small("backup")
        .begin()
        .count_of("has only older checkpoints (up to 100 images): fetching the checkpoint at 200")
    )
    assert file.read_bytes() == good


def test_anothers_mirror_is_refused_and_untouched(small, server, capsys):
    small("run").begin().upload(100)
    before = {key: server.get(key) for key in keys(server)}
    with pytest.raises(
        CheckpointError, match=r"another run:\n  loss.kl: .* in the mirror, 0.5 in this run\nChoose another location"
    ):
        small("other", loss__kl=0.5).begin()
    moved = small("other", report__every_steps=7)
    with pytest.raises(CheckpointError, match="the data set differs"):
        moved.mirror.look("4567")
    server.delete("runs/mine/config.yaml")
    with pytest.raises(CheckpointError, match=r"no config\.yaml that identifies their run"):
        small("other").begin()
    server.put("runs/mine/config.yaml", before["runs/mine/config.yaml"])
    assert {key: server.get(key) for key in keys(server)} == before
    allowed = small("allowed", allow_changes=True, loss__kl=0.5).begin()
    assert "belongs to another run: loss.kl" in capsys.readouterr().out and allowed.checkpoints() == [100]
    allowed.upload(200)
    assert small("again", loss__kl=0.5).begin().checkpoints() == [200]


def test_anothers_mirror_is_left_alone_by_a_run_that_could_not_look(small, proxy, server):
    first = small("run").begin()
    first.upload(100)
    first.mirror.close()
    before = keys(server)
    other = small("other", loss__kl=0.5)
    other.folder.mkdir()
    other.save(50)
    with proxy.down():
        other.begin()
    other.mirror.offer(50)
    other.wait(lambda: other.count_of("is the mirror of another run"))
    other.mirror.offer(60)
    other.finish()
    assert keys(server) == before and other.count_of("Training continues without a mirror") == 1


def test_one_that_goes_on_takes_the_mirror_over(small, server):
    lost = small("lost").begin()
    lost.upload(100)
    found = small("found").begin()
    found.upload(200)
    lost.save(300)
    lost.mirror.offer(300)
    lost.finish()
    assert lost.count_of("was taken over by process") == 1 and mirrored(server) == [100, 200]


def test_a_mirror_out_of_reach(small, proxy, capsys):
    with proxy.down():
        with pytest.raises(CheckpointError, match=r"the position to resume from is unknown(.|\n)*checkpoint\.mirror="):
            small("empty").begin()
        own = small("own")
        own.folder.mkdir()
        own.save(100)
        own.begin()
        assert "using only the run folder" in capsys.readouterr().out
        own.mirror.offer(100)
        own.wait(lambda: own.count_of("fails:"))
        began = time.monotonic()
        own.mirror.finish(finished=True, stopping=lambda: True)
        assert time.monotonic() - began < FINISH_SECONDS / 10 and own.count_of("lacks the checkpoint at 100 images")


@pytest.mark.parametrize(("status", "times"), [(403, 2), (503, 4)])  # the client itself tries 503 three times
def test_an_answer_that_is_an_error_is_told_once_and_got_over(small, proxy, server, status, times):
    run = small("run").begin()
    proxy.add(Status(status), path="*images*", method="PUT", first=times)
    run.save(100)
    run.mirror.offer(100)
    run.finish()
    assert run.count_of("fails:") == run.count_of("works again") == 1 and mirrored(server) == [100]
    assert run.count_of("waiting for s3://data/runs/mine") == 1


def test_stop_signals_do_not_reach_it_and_it_ends_with_the_run(small, server):
    run = small("run").begin()
    run.mirror.offer(None)
    process = run.mirror._uploader._process
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)  # during the start
    run.upload(100)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    run.upload(200)
    assert mirrored(server) == [100, 200] and process.poll() is None
    process.kill()
    process.wait()
    run.upload(300)
    assert run.count_of("the mirror's process has ended") == 1 and mirrored(server) == [200, 300]
    began = time.monotonic()
    run.finish(ExitStatus.STOPPED)
    assert time.monotonic() - began < STOP_SECONDS


def test_by_hand(small, tmp_path):
    def ask(*words: str) -> dict:
        command = [sys.executable, str(ROOT / "tools" / "mirror.py"), *words]
        return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    small("run").begin().upload(100, 200)
    found = ask("look", URL)
    assert found["images"] == [200, 100] and found["identity"]["fingerprint"] == FINGERPRINT
    assert ask("fetch", URL, "100", str(tmp_path / "new" / "somewhere")) == {}
    assert store.open_checkpoint(tmp_path / "new" / "somewhere").images == 100
    assert "missing or unreadable" in ask("fetch", URL, "300", str(tmp_path))["damaged"]
    assert "cannot be chained" in ask("look", "zip://a::s3://b/c")["mistake"]


@pytest.mark.parametrize("url", ["folder", "memory://places/a", "s3://data/places/a"])
def test_places_take_open_files_and_drop_folders(proxy, tmp_path, url):
    place = open_folder(str(tmp_path / "new" / "place") if url == "folder" else url, seconds=5)
    for name, data in (("top", b"1"), ("a/one", b"22"), ("a/b/two", b"3"), ("empty", b""), ("ab", b"4" * 9_000_000)):
        place.put(io.BytesIO(data), name)
        assert place.read(name) == data
    place.put(io.BytesIO(b"another"), "top")
    assert place.read("top") == b"another"
    place.remove_folder("a")
    for name in ("a/one", "a/b/two"):
        with pytest.raises(FileNotFoundError):
            place.read(name)
    assert {"ab", "empty", "top"} <= set(place.names())
    place.remove_folder("a")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat > /tmp/x", "commands are not run"),
        ("http://example.org/a", "can only be read"),
        ("s3://", "names no bucket"),
        ("s3n3://bucket/a", "no library knows s3n3://"),
        ("sftp://me:secret@host/a", "must not hold a password"),
        ("zip://a::s3://bucket/b", "cannot be chained"),
    ],
)
def test_urls_that_cannot_be_a_mirror(url, message):
    with pytest.raises(ConfigError, match=message):
        config_files.loads("", [f"checkpoint.mirror={url}"])


@pytest.mark.parametrize("url", ["", "backup/mine", "/backup/mine", "file:///backup", URL, "gs://b/p", "sftp://me@h/a"])
def test_urls_that_can(url):
    assert config_files.loads("", [f"checkpoint.mirror={url}"]).checkpoint.mirror == url


def test_a_mirror_in_the_run_folder_is_refused(small, tmp_path):
    with pytest.raises(CheckpointError, match="lies in the run folder"):
        small("run", str(tmp_path / "run" / "mirror")).begin()


def test_markers_lead_nowhere_else(small, server, tmp_path):
    run = small("run").begin()
    run.upload(100, 200)
    key = "runs/mine/checkpoints/images-000000200/state.json"
    marker = json.loads(server.get(key))
    marker["files"]["../../evil"] = marker["files"]["ema.safetensors"]
    server.put(key, json.dumps(marker).encode())
    server.put("runs/mine/evil", b"")
    other = small("other").begin()
    assert other.checkpoints() == [100] and other.count_of("not a valid file name") and not list(tmp_path.rglob("evil"))


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The uninterrupted run."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", data)
    assert run.train() == 0, run.output()
    return run


def mirroring(folder: Path, data: Path, *overrides: str) -> Run:
    return Run(folder, data, f"checkpoint.mirror={URL}", "checkpoint.keep_last=2", "data.retry_seconds=1", *overrides)


def uploaders(pid: int) -> list[psutil.Process]:
    """The uploading descendants of this process. Ended processes are left out."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # includes ZombieProcess
            if "dist_t2i.checkpoint.mirror_worker" in child.cmdline():
                found.append(child)
    return found


@pytest.mark.slow
def test_a_run_whose_folder_is_lost_goes_on_at_the_very_step(whole, data, tmp_path, proxy, server):
    """The folder is lost after a stop, and again after a kill -9 during an upload. The result equals the uninterrupted
    run."""
    run = mirroring(tmp_path / "run", data, "checkpoint.every_images=32")
    (process,) = run.start("checkpoint.every_images=1000")
    wait_for_run(lambda: (run.folder / "metrics.jsonl").exists() and len(run.metrics()) >= 1, process, run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 75, run.output()
    (stopped,) = (int(name[7:]) for name in run.checkpoints())
    assert mirrored(server) == [stopped]

    shutil.rmtree(run.folder)
    proxy.add(Stall(60), path="*images-000000080/generator.safetensors", method="PUT")
    (process,) = run.start()
    wait_for_run(lambda: proxy.seen("*images-000000080/generator.safetensors", "PUT"), process, run)
    assert f"fetching the checkpoint at {stopped} images" in run.output()
    (uploader,) = uploaders(process.pid)
    process.kill()
    process.wait()
    assert psutil.wait_procs([uploader], timeout=60)[1] == [], "it ends with the training"
    markers = [int(key.split("images-")[1][:9]) for key in keys(server) if key.endswith("/state.json")]
    assert markers and 80 not in markers
    proxy.clear()

    shutil.rmtree(run.folder)
    assert run.train() == 0, run.output()
    assert f"fetching the checkpoint at {markers[-1]} images" in run.output()
    assert_same_state(run, whole)
    assert run.losses() == whole.losses(), "the curves go on as well"
    assert mirrored(server) == [markers[-1], 80]


@pytest.mark.slow
def test_the_server_is_down_for_a_while(whole, data, tmp_path, proxy, server):
    run = mirroring(tmp_path / "run", data, "checkpoint.every_images=16")
    (process,) = run.start()
    wait_for_run(lambda: (run.folder / "metrics.jsonl").exists() and len(run.metrics()) >= 2, process, run)
    with proxy.down():
        wait_for_run(lambda: "waiting for" in run.output() and "fails:" in run.output(), process, run)
        assert_same_state(run, whole)
    assert process.wait(240) == 0, run.output()
    assert run.output().count("fails:") == run.output().count("works again") == 1
    assert mirrored(server)[-1] == 80 and "Traceback" not in run.output()


@pytest.mark.slow
def test_a_run_folder_put_there_by_hand_is_a_mirror(whole, data, tmp_path, proxy, server):
    """Another run is refused, and two ranks skip a damaged checkpoint."""
    server.put_folder(whole.folder, "runs/mine/")
    key = "runs/mine/checkpoints/images-000000080/generator.safetensors"
    server.put(key, flip(server.get(key)))
    other = mirroring(tmp_path / "other", data, "loss.kl=0.123")
    assert other.train() == 2 and not other.folder.exists()
    assert "mirror of another run:\n  loss.kl" in other.output() and "Traceback" not in other.output()
    run = mirroring(tmp_path / "run", data)
    assert run.train(ranks=2) == 0, run.output()
    assert "images-000000080/generator.safetensors: does not have its saved size" in run.output()
    assert "fetching the checkpoint at 64 images" in run.output() and "Traceback" not in run.output()
    assert_same_state(run, whole, tolerance=1e-5)
    assert mirrored(server) == [64, 80], "the damaged one was replaced, the oldest went"
