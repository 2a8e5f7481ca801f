"""Stopping, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dist_t2i.distributed.preemption import SAME_PRESS, StopFlag, StopReason
from dist_t2i.errors import ExitStatus
from dist_t2i.utils.processes import STOP_SIGNALS, signals_blocked
from ranks import ROOT, free_port

PROGRAM = ROOT / "tests" / "support" / "programs" / "stoppable.py"
BIN = Path(sys.executable).parent


class Run:
    """tests/support/programs/stoppable.py under a launcher, in a process group of its own, like a job of a shell."""

    def __init__(self, folder: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,), ranks: int = 1):
        self.folder, self.ranks = folder, ranks
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, str(PROGRAM), str(folder), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # even if the tests run under nohup
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            )
        self.wait_for(lambda: all((folder / f"pid-{rank}").exists() for rank in range(ranks)))
        time.sleep(0.1)
        self.pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(ranks)]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def signal_all(self, number: int) -> None:
        """Sends SIGINT to every process of the job, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def saved(self) -> list[str]:
        return [file.read_text() for file in sorted(self.folder.glob("saved-*"))]

    def wait(self) -> int:
        """The exit status of the command, after the ranks have also ended."""
        status = self.process.wait(240)
        end = time.monotonic() + 60
        while any(psutil.pid_exists(pid) for pid in self.pids):
            assert time.monotonic() < end, "a rank lives on"
            time.sleep(0.05)
        return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_stops_with_a_save_and_a_status_that_says_go_on(number: signal.Signals, tmp_path: Path):
    run = Run(tmp_path, "0.1")
    run.process.send_signal(number)
    assert run.wait() == ExitStatus.STOPPED == 75
    assert run.saved() == [f"{number.name}, worker alive, rank 0 of 1 under plain"]
    assert f"{number.name}: saving a checkpoint after this step" in run.output.read_text()


def test_workers_survive_a_signal_to_the_whole_job_until_the_save(tmp_path: Path):
    run = Run(tmp_path, "0.5")
    run.signal_all(signal.SIGUSR2)
    assert run.wait() == ExitStatus.STOPPED
    assert run.saved() == ["SIGUSR2, worker alive, rank 0 of 1 under plain"]


def test_the_second_ctrl_c_stops_at_once_and_takes_the_workers_along(tmp_path: Path):
    run = Run(tmp_path, "60")
    worker = psutil.Process(int((tmp_path / "worker-0").read_text()))
    run.signal_all(signal.SIGINT)
    time.sleep(SAME_PRESS + 0.2)
    run.signal_all(signal.SIGINT)
    assert run.wait() == ExitStatus.INTERRUPTED == 130
    assert run.saved() == []  # a save takes 60 seconds here
    assert psutil.wait_procs([worker], timeout=120)[1] == []  # it was killed; otherwise it would sleep for ten minutes
    assert "second Ctrl-C" in run.output.read_text()


def test_a_ctrl_c_that_a_launcher_repeats_is_one(tmp_path: Path):
    run = Run(tmp_path, "1.5")
    run.signal_all(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == ExitStatus.STOPPED
    assert run.saved() == ["SIGINT, worker alive, rank 0 of 1 under plain"]


def test_the_second_ctrl_c_ends_a_rank_that_hangs_in_c(tmp_path: Path):
    run = Run(tmp_path, "0", "hang")
    run.process.send_signal(signal.SIGINT)
    time.sleep(SAME_PRESS + 0.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == ExitStatus.INTERRUPTED


def test_nohup_is_respected(tmp_path: Path):
    run = Run(tmp_path, "0", launcher=("nohup", sys.executable))
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == ExitStatus.STOPPED
    assert run.saved() == ["SIGTERM, worker alive, rank 0 of 1 under plain"]


def test_a_shell_that_goes_away_is_no_launcher(tmp_path: Path):
    run = Run(tmp_path, "0", launcher=("sh", "-c", '"$@" & wait', "sh", sys.executable))
    run.process.kill()
    time.sleep(1.5)
    assert psutil.pid_exists(run.pids[0])
    os.kill(run.pids[0], signal.SIGTERM)
    run.wait()
    assert run.saved() == ["SIGTERM, worker alive, rank 0 of 1 under plain"]


def test_children_start_with_the_signals_blocked_and_none_is_lost():
    with StopFlag() as stop:
        with signals_blocked():
            os.kill(os.getpid(), signal.SIGUSR2)
            status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
        assert all(blocked >> (number - 1) & 1 for number in STOP_SIGNALS)
        assert stop.agreed() is StopReason.SIGUSR2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_forked_childs_signals_are_its_own():
    with StopFlag() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGINT):
            time.sleep(0.1)
            os.kill(child, number)
        time.sleep(SAME_PRESS + 0.2)
        os.kill(child, signal.SIGINT)  # if the parent received it, this second Ctrl-C would end the tests
        time.sleep(0.2)
        assert not stop.requested
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_ranks_agree_on_the_largest():
    with StopFlag() as first, StopFlag() as second:
        os.kill(os.getpid(), signal.SIGUSR1)  # only the last installed handler receives it
        assert second.requested and not first.requested
        sent: list[int] = []
        assert second.agreed(lambda number: sent.append(number) or number) is StopReason.SIGUSR1
        assert first.agreed(lambda number: max(number, *sent)) is StopReason.SIGUSR1
        assert first.requested


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopFlag():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# ---- under launchers: what `dist_t2i.distributed.preemption` documents ----------------------------------------------------------------


def _launcher_of(run: Run) -> int:
    return psutil.Process(run.pids[0]).ppid()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "status", "why"),
    [
        (lambda run: os.kill(run.pids[1], signal.SIGUSR2), 75, "SIGUSR2"),
        (lambda run: run.signal_all(signal.SIGINT), -signal.SIGINT, "SIGINT"),
        (lambda run: os.kill(_launcher_of(run), signal.SIGTERM), 1, "SIGTERM"),
        (lambda run: run.process.terminate(), -signal.SIGTERM, "the launcher is gone"),
    ],
    ids=["USR2 to a rank", "Ctrl-C", "TERM to the launcher", "TERM to the command"],
)
def test_under_deepspeed_all_ranks_save(act: Callable[[Run], None], status: int, why: str, tmp_path: Path):
    launcher = (str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()))
    run = Run(tmp_path, "1.5", launcher=launcher, ranks=2)
    act(run)
    assert run.wait() == status
    assert run.saved() == [f"{why}, worker alive, rank {rank} of 2 under deepspeed" for rank in range(2)]


@pytest.mark.slow
def test_under_torchrun_all_ranks_save_although_ctrl_c_arrives_twice(tmp_path: Path):
    launcher = (str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()))
    run = Run(tmp_path, "1.5", launcher=launcher, ranks=2)
    run.signal_all(signal.SIGINT)
    assert run.wait() == 1
    assert run.saved() == [f"SIGINT, worker alive, rank {rank} of 2 under torchrun" for rank in range(2)]
