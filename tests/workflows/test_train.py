"""`dist_t2i/train.py` as users run it: launchers, mistakes, NaN, a full disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ranks import ROOT, free_port
from runs import TRAIN, Run, environment, make_set

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


def call(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], env=environment(**env), capture_output=True, text=True, cwd=ROOT, timeout=240
    )


def test_help_is_quick_and_imports_no_torch():
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        shown = call(sys.executable, TRAIN, "--help")
        times.append(time.perf_counter() - begin)
        assert shown.returncode == 0 and "section.key=value" in shown.stdout
    print(f"--help took {min(times):.2f} s")
    imports = call(sys.executable, "-X", "importtime", TRAIN, "--help").stderr
    assert not re.search(r"\| +(torch|deepspeed|numpy)\b", imports)


def test_every_key_is_in_help_config():
    shown = call(sys.executable, TRAIN, "--help-config")
    assert shown.returncode == 0
    assert "generator_stage" in shown.stdout and "half_life_images" in shown.stdout


def test_every_mistake_in_one_report(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("train: {global_batsh: 8}\nloss: {penalty: r2}\nengine: {discriminator_stage: 3}\n")
    shown = call(sys.executable, TRAIN, "--config", config, "data.image_size=abc")
    assert shown.returncode == 2
    for word in ("global_batsh", "global_batch", "r2", "image_size", "abc"):
        assert word in shown.stderr
    assert "Traceback" not in shown.stderr


def test_stage_3_of_the_discriminator_refuses_exact_penalties(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("engine: {discriminator_stage: 3}\nloss: {penalty: r1}\n")
    shown = call(sys.executable, TRAIN, "--config", config)
    assert shown.returncode == 2 and "fd_r1" in shown.stderr


def test_no_configuration():
    """Without --config, the command trains the default (tests/sharding/test_built_in.py)."""
    shown = call(sys.executable, TRAIN, "--config", "nowhere.yaml")
    assert shown.returncode == 2 and shown.stderr.startswith("error: ") and "Traceback" not in shown.stderr


@pytest.mark.slow
def test_no_data_set(tmp_path, data):
    run = Run(tmp_path / "run", tmp_path / "nothing")
    assert run.train() == 2
    assert "tools/shard.py" in run.output() and "Traceback" not in run.output()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        (["deepspeed"], 1),
        (["deepspeed", "--num_gpus", "2"], 2),
        (["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"], 2),
    ],
)
def test_launchers(tmp_path, data, launcher, ranks):
    run = Run(tmp_path / "run", data, "train.total_images=24")
    port = str(free_port())
    command = [BIN / launcher[0], *(part.format(port=port) for part in launcher[1:])]
    command += ["--master_port", port] if launcher[0] == "deepspeed" else []
    done = call(*command, *run.command())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} rank" in done.stdout + done.stderr
    assert run.checkpoints()[-1] == "images-000000024"


@pytest.mark.slow
def test_as_two_tasks_of_slurm(tmp_path, data):
    """srun passes the rank to a task only in the environment, which this test sets."""
    run = Run(tmp_path / "run", data, "train.total_images=16")
    common = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    common |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2"}
    common |= {"SLURM_STEP_TASKS_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, *run.command()],
            env=environment(**common, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for task in range(2)
    ]
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert "2 ranks" in outputs[0] and "2 ranks" not in outputs[1]


@pytest.mark.slow
def test_the_run_folder_tells_what_ran(tmp_path, data):
    run = Run(tmp_path / "run", data, "train.total_images=16")
    assert run.train() == 0, run.output()
    resolved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert resolved["train"]["total_images"] == 16 and resolved["engine"]["precision"] == "fp32"
    described = json.loads((run.folder / "environment.json").read_text())
    manifest = json.loads((data / "manifest.json").read_text())
    assert described["data"]["fingerprint"] == manifest["fingerprint"]
    assert (run.folder / "samples" / "images-000000016.png").exists() and (run.folder / "curves.png").exists()
    assert run.train() == 0, "a finished run is finished again at once"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "frozen"])
def test_text_modes(tmp_path, data, mode):
    overrides = [f"text.mode={mode}", "train.total_images=24", "text.embedding=16"]
    if mode == "frozen":
        import torch
        from safetensors.torch import save_file

        colors, shapes = ("red", "green", "blue", "orange"), ("square", "circle", "bar")
        captions = [f"a {c} {s}" for c in colors for s in shapes] + [f"{s}, {c}" for c in colors for s in shapes]
        table = tmp_path / "table.safetensors"
        torch.manual_seed(0)
        save_file({"vectors": torch.randn(len(captions), 12)}, table, metadata={"captions": json.dumps(captions)})
        overrides.append(f"text.frozen={table}")
    run = Run(tmp_path / "run", data, *overrides)
    assert run.train() == 0, run.output()
    prefixes = {name.split("/")[1].split(".")[0] for name in run.tensors(24)}
    assert prefixes == ({"generator", "discriminator", "text"} if mode == "shared" else {"generator", "discriminator"})


@pytest.mark.slow
def test_numbers_that_break_down_stop_the_run_and_spare_the_checkpoint(tmp_path, data):
    run = Run(tmp_path / "run", data, "train.total_images=64")
    assert run.train("train.total_images=32") == 0, run.output()
    status = run.train("optimizer.discriminator_lr=1e30", "--allow-changes")
    assert status == 1, run.output()
    said = run.output()
    assert re.search(r"(loss|grad|logit)/\S+ is (NaN|infinite)", said) and "images-000000032" in said
    assert "parameter groups: " in said and "Traceback" not in said
    assert run.checkpoints() == ["images-000000032"], "nothing that is not finite may be committed"
    assert json.loads((run.folder / "progress.json").read_text())["state"] == "failed"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="filling a disk takes a file system of its own: run as root")
def test_a_full_disk_warns_and_training_goes_on(tmp_path, data):
    run = Run(tmp_path / "run", data, "checkpoint.every_images=16", "train.total_images=160")
    folder = run.folder / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode()}")
    try:
        filler = folder / "filler"
        filler.write_bytes(bytes(20 * 2**20 - 300_000))
        process = run.start()[0]
        deadline = time.monotonic() + 120
        while "could not be written" not in run.output():
            assert process.poll() is None and time.monotonic() < deadline, run.output()
            time.sleep(0.02)
        filler.unlink()
        assert process.wait(240) == 0, run.output()
        assert "Training continues" in run.output()
        assert run.checkpoints()[-1] == "images-000000160"
    finally:
        subprocess.run(["umount", str(folder)], check=True)
