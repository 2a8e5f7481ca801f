"""An ablation as arrays of seeds in a real Slurm: queued, looked at, and read when it is done."""

import json
import subprocess
import sys
import time

import pytest

from jobs import LOCAL
from models_on_disk import write_tone_set
from ranks import ROOT
from runs import CONFIG

PLAN = """
name: tiny
base: BASE
data: DATA
images: 16
seeds: 2
protocol: quick
arms: {dual: , shared: {overrides: [text.mode=shared]}}
"""


@pytest.mark.slurm
@pytest.mark.slow
def test_arrays_of_seeds_and_then_the_table(cluster, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "base.yaml").write_text(CONFIG)
    data = write_tone_set(tmp_path / "set", roles=8)
    plan, out = tmp_path / "ablation-tiny.yaml", tmp_path / "out"
    plan.write_text(PLAN.replace("BASE", str(tmp_path / "base.yaml")).replace("DATA", str(data)))

    def ablate():
        command = [sys.executable, str(ROOT / "tools" / "ablate.py"), "--config", str(plan), "--out", str(out)]
        command += ["--slurm-profile", str(LOCAL)]
        done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout

    said = ablate()
    assert "dual: 2 seeds queued as " in said and "shared: 2 seeds queued as " in said
    assert "seed-1" in ablate()  # how they are doing, or the scores of what is done already
    end = time.monotonic() + 180
    while finished(out) < 4:
        assert time.monotonic() < end, cluster.command("squeue")
        time.sleep(0.5)
    assert str(out / "table.md") in ablate()
    table = json.loads((out / "table.json").read_text())
    assert {arm: sorted(table["measures"][0]["values"][arm]) for arm in ("dual", "shared")} == {
        "dual": ["0", "1"],
        "shared": ["0", "1"],
    }


def finished(out) -> int:
    """Runs that say so."""
    states = [json.loads(path.read_text())["state"] for path in out.glob("*/seed-*/progress.json")]
    return states.count("finished")
