"""The results of the jobs and commands that ran in the background of the other tests (scenarios.py)."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]


def test_the_readmes_four_lines(the_readmes_four_lines):
    """The output of each line was checked while the lines ran; this is the last check before `down`."""
    assert "320 of 320 images" in the_readmes_four_lines and "preempted or stopped once" in the_readmes_four_lines


def test_an_ablation_as_arrays_of_seeds(ablation):
    table = json.loads((ablation / "table.json").read_text())
    assert {arm: sorted(table["measures"][0]["values"][arm]) for arm in ("dual", "shared")} == {
        "dual": ["0", "1"],
        "shared": ["0", "1"],
    }


def test_the_same_failure_three_times(crash):
    run = crash
    ends = run.attempts("end")
    assert [end["verdict"] for end in ends] == ["requeued", "requeued", "given up"], run.story()
    said = run.tool("status", str(run.folder), status=1)
    assert "failed" in said and "3 times in a row" in said and "ValueError: the 7th step cannot be" in said
    assert "last committed checkpoint: 40 images" in said


def test_a_divergence(diverged):
    """One attempt, one message, and no checkpoint that a resume would take."""
    run = diverged
    (end,) = run.attempts("end")
    assert (end["status"], end["verdict"]) == (78, "diverged"), run.story()
    said = run.tool("status", str(run.folder), status=1)
    assert "diverged" in said and "because training diverged at" in said and "healthy: at most" in said, said
    assert run.log(0).count("the first sign began") == 1 and "training diverged at" not in run.log(1)
    assert "last committed checkpoint: none yet" in said


def test_bad_data_three_times(bad_data):
    run = bad_data
    assert "Traceback" not in run.log(), run.log()
    said = run.tool("status", str(run.folder), status=1)
    assert "3 times in a row" in said and "DataError" in said, said


def test_a_rank_that_never_comes_to_the_collective(stuck, whole2):
    """The rank is reported with its stack; the next attempt has no defect and continues."""
    run = stuck
    assert len(run.attempts("begin")) == 2, run.story()
    run.assert_equals(whole2)
    verdict = json.loads((run.folder / "ranks" / "hang.json").read_text())
    (guilty,) = verdict["guilty"]
    assert guilty["rank"] == 1 and verdict["waiting"] == [0]
    assert any("trainer.py" in frame and frame.endswith(" _step") for frame in guilty["stacks"]["MainThread"])
    assert "is not in the collective" in run.log(0) + run.log(1)


def test_a_port_that_is_taken(taken_port, whole2):
    """Rank 0 reports the port, then the other ranks are ended. The next attempt uses another port."""
    run = taken_port
    first, last = run.attempts("end")
    assert first["verdict"] == "requeued" and first["reason"].startswith("rank 0: LaunchError: another program "), first
    assert "(another training?) uses port " in first["reason"] and "Traceback" not in run.log(0), run.log(0)
    assert last["verdict"] == "finished"
    run.assert_losses(whole2)


def test_ten_random_events(random_events, whole2):
    """After any events in any order, the weights equal those of the undisturbed run."""
    run = random_events
    assert len(run.attempts("begin")) == 11, run.story()
    run.assert_equals(whole2)


def test_an_orphan_can_never_commit(orphan, whole1):
    """The late orphan has changed nothing: the run that took over equals the undisturbed run."""
    run = orphan
    run.assert_equals(whole1)
    verdicts = {(end["restart"], end["verdict"]) for end in run.attempts("end")}
    assert verdicts == {(0, "superseded"), (1, "finished")}, verdicts
