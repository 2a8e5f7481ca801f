"""How a run that diverged ends and continues, on files; tests/workflows/test_diverged_runs.py trains real runs."""

from __future__ import annotations

import json

import pytest
import torch

from dist_t2i.checkpoint import divergence, store
from dist_t2i.checkpoint.lease import acquire
from dist_t2i.checkpoint.store import Retention
from dist_t2i.errors import DivergedError

FIRST = {"at": 350, "since": 250, "healthy": 220, "reason": "logit/fake is -318", "rewound": False}


@pytest.fixture
def lease(tmp_path):
    """Of a run that has checkpoints at 100, 200, 300 and 400 images."""
    mine = acquire(tmp_path / "checkpoints")
    for images in (100, 200, 300, 400):
        store.save(mine, images, {"ema": {"w": torch.ones(3)}}, {"seed": 1}, keep=Retention(last=9))
    yield mine
    mine.release()


def newest(run):
    found = store.load_latest(run)
    return found.images, found.state.get("divergences")


def stop(lease, run, *divergences):
    return divergence.stop(lease, run, [*divergences], "training diverged at 350 images")


def test_a_stop_goes_back_and_says_how_to_continue(lease, tmp_path):
    latest, message = stop(lease, tmp_path, FIRST)
    assert newest(tmp_path) == (200, [FIRST]) and latest == store.load_latest(tmp_path)
    assert message.startswith("training diverged at 350 images\n")
    for words in (str(latest.folder), "--allow-changes", "train.on_divergence=rewind", "train.on_divergence=warn"):
        assert words in message
    assert json.loads((tmp_path / "diverged.json").read_text()) == {"message": message, "divergences": [FIRST]}


def test_without_a_healthy_checkpoint_nothing_is_left_to_resume_from(lease, tmp_path):
    latest, message = stop(lease, tmp_path, {**FIRST, "since": 50, "healthy": 0})
    assert latest is None and store.load_latest(tmp_path) is None
    assert "There is no healthy checkpoint." in message and "from the beginning" in message


def test_the_same_command_is_refused(lease, tmp_path):
    divergence.refuse(tmp_path, "stop", allow_changes=False)
    _, message = stop(lease, tmp_path, FIRST)
    with pytest.raises(DivergedError) as caught:
        divergence.refuse(tmp_path, "stop", allow_changes=False)
    assert caught.value.status == 78 and message in str(caught.value)
    divergence.refuse(tmp_path, "stop", allow_changes=True)
    divergence.refuse(tmp_path, "warn", allow_changes=False)
    divergence.refuse(tmp_path, "rewind", allow_changes=False)


def test_a_fourth_rewind_is_refused(lease, tmp_path):
    before = [{**FIRST, "rewound": True}] * 3
    _, message = stop(lease, tmp_path, *before, FIRST)
    assert "train.on_divergence=rewind" not in message
    with pytest.raises(DivergedError):
        divergence.refuse(tmp_path, "rewind", allow_changes=False)
    assert divergence.resume(lease, tmp_path, "rewind") == [*before, FIRST]
    assert divergence.rate_scale([*before, FIRST]) == 1 / 8


@pytest.mark.parametrize(("way", "rewound"), [("rewind", True), ("warn", False), ("stop", False)])
def test_a_resume_continues_from_the_healthy_checkpoint(lease, tmp_path, way, rewound):
    """Also if the process that stopped, or an earlier resume, was killed before it had gone back."""
    assert divergence.resume(lease, tmp_path, way) == []
    stop(lease, tmp_path, FIRST)
    store.save(lease, 300, {"ema": {"w": torch.zeros(3)}}, {"seed": 1}, keep=Retention(last=9))
    for _ in range(2):
        assert divergence.resume(lease, tmp_path, way) == [{**FIRST, "rewound": rewound}]
        assert newest(tmp_path) == (200, [{**FIRST, "rewound": rewound}])
    divergence.settle(tmp_path)
    divergence.settle(tmp_path)
    assert divergence.resume(lease, tmp_path, way) == []


def test_rates_are_halved_with_each_rewind():
    rewound = {**FIRST, "rewound": True}
    assert divergence.rate_scale([]) == divergence.rate_scale([FIRST]) == 1 and divergence.rates([FIRST]) == ""
    assert divergence.rate_scale([rewound, FIRST, rewound]) == 0.25
    assert "0.25 times the configured ones (rewind 2 of 3)" in divergence.rates([rewound, FIRST, rewound])
    assert divergence.may_rewind([rewound] * 2) and not divergence.may_rewind([rewound] * 3)
