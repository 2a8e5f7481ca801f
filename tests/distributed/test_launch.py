"""A process finds its rank and the other ranks. (`test_preemption.py` starts ranks under the real launchers.)"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dist_t2i.distributed.launch import free_ports, has_gpu, interface_towards, job_port, prepare
from dist_t2i.errors import LaunchError
from ranks import ROOT

BIN = Path(sys.executable).parent

SLURM = {
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "PATH": os.environ["PATH"],
}


def test_plain_python_is_one_rank_at_any_free_port():
    env = {"PATH": "/usr/bin"}
    rank = prepare(env)
    assert (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size, rank.launcher) == (0, 1, 0, 1, "plain")
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_ADDR"]) == ("0", "1", "0", "127.0.0.1")
    assert env["MASTER_PORT"] == "0"
    assert int(env["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
    assert env["PATH"].split(":") == [str(BIN), "/usr/bin"]


def test_free_ports_lie_where_no_outgoing_connection_does_and_are_free():
    ports = free_ports(5, apart=10_000)
    assert len(set(ports)) == 5 and all(port >= 12_000 and port + 10_000 < 32_768 for port in ports)
    with contextlib.ExitStack() as taken:
        for port in (*ports, *(port + 10_000 for port in ports)):
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        with pytest.raises(LaunchError, match=r"only [0-9]+ of 10000 ports are free"):
            free_ports(10_000)


def test_what_the_user_has_set_stays():
    env = {"OMP_NUM_THREADS": "3", "MASTER_PORT": "12345", "GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "xpu"}
    before = dict(env)
    prepare(env)
    assert {key: env[key] for key in before} == before


def test_launcher_variables_are_taken_as_they_are():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2950"}
    deepspeed = prepare({**env, "CROSS_RANK": "1", "LOCAL_SIZE": "2"})
    assert (deepspeed.rank, deepspeed.world_size, deepspeed.local_world_size, deepspeed.launcher) == (
        3,
        4,
        2,
        "deepspeed",
    )
    torchrun = prepare({**env, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"})
    assert (torchrun.local_rank, torchrun.local_world_size, torchrun.launcher) == (1, 2, "torchrun")


def test_threads_are_shared_between_the_ranks_of_a_machine():
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    env |= {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}  # torchrun's default, not set by the user
    prepare(env)
    assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_one_thread_that_the_user_asks_for_stays_where_torchrun_has_said_nothing():
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    env |= {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    prepare(env)
    assert env["OMP_NUM_THREADS"] == "1"


def test_ranks_talk_over_the_interface_that_leads_to_the_first():
    for address in ("127.0.0.1", "127.0.0.7", "localhost"):
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address}
        prepare(env)
        assert interface_towards(address) == env["GLOO_SOCKET_IFNAME"]
        assert Path("/sys/class/net", env["GLOO_SOCKET_IFNAME"], "flags").read_text() == "0x9\n", "up, and loopback"
    assert interface_towards("no.such.name.invalid") is None


def test_srun_tells_the_rank_and_an_address_that_is_given_is_kept():
    env = {**SLURM, "MASTER_ADDR": "10.1.2.3"}
    rank = prepare(env)
    assert (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size, rank.launcher) == (5, 6, 1, 2, "srun")
    assert (env["MASTER_ADDR"], env["RANK"], env["LOCAL_WORLD_SIZE"]) == ("10.1.2.3", "5", "2")
    assert env["MASTER_PORT"] == str(job_port(SLURM))


def test_uneven_nodes_under_srun():
    env = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3", "SLURM_NODEID": "3", "MASTER_ADDR": "x"}
    assert prepare(env).local_world_size == 3


def scontrol(folder: Path, hostnames: str, node: str) -> dict[str, str]:
    """The environment of a machine whose `scontrol` gives this answer."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in\n*hostnames*) printf '{hostnames}' ;;\n*) echo '{node}' ;;\nesac\n")
    program.chmod(0o755)
    return {**SLURM, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Programs are found by this process's PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_the_master_is_the_first_node_by_name_where_names_resolve(path: Path):
    env = scontrol(path, "localhost\\nn2\\nn3\\n", "")
    prepare(env)
    assert env["MASTER_ADDR"] == "localhost"


def test_the_master_is_the_first_nodes_address_where_names_do_not_resolve(path: Path):
    env = scontrol(path, "n1.invalid\\nn2\\n", "NodeName=n1.invalid Arch=x86_64 NodeAddr=127.0.0.9 CPUTot=4")
    prepare(env)
    assert env["MASTER_ADDR"] == "127.0.0.9"


def test_slurm_without_an_answer_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="set MASTER_ADDR yourself"):
        prepare({**SLURM})


def test_the_port_is_the_same_on_all_ranks_and_another_one_after_a_restart():
    ports = {job_port({**SLURM, "SLURM_PROCID": str(n)}) for n in range(6)}
    assert len(ports) == 1
    restarts = [job_port({**SLURM, "SLURM_RESTART_COUNT": str(n)}) for n in range(20)]
    assert len(set(restarts)) == 20
    jobs = [job_port({**SLURM, "SLURM_JOB_ID": str(n)}) for n in range(4321, 4341)]
    assert len(set(jobs)) == 20
    assert all(20_000 <= port < 30_000 for port in [*ports, *restarts, *jobs])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "a", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK must be a whole number, is a"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_half_an_environment_is_refused(env: dict[str, str], message: str):
    with pytest.raises(LaunchError, match=message):
        prepare(env)


def test_a_hidden_gpu_is_no_gpu():
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": ""})
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": "-1"})


def test_gpu_detection_agrees_with_torch():
    code = "import torch; print(torch.cuda.is_available())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert str(has_gpu(os.environ)) == answer


def test_nothing_here_imports_torch():
    code = (
        "import sys, dist_t2i.distributed.launch, dist_t2i.distributed.preemption, dist_t2i.errors, dist_t2i.reporting.reporter, dist_t2i.config.files\n"
        "dist_t2i.distributed.launch.prepare(); print([m for m in ('torch', 'deepspeed', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
