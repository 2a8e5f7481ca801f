"""Two ZeRO engines on two ranks train like plain PyTorch on one process, to 1e-6 of the losses and the weights.

The cases cover every stage pair, accumulation, text mode and penalty, with contrastive negatives from the other rank.
"""

from __future__ import annotations

import pytest
import torch

from ranks import run_ranks
from small_gan import (
    BATCH,
    VOCABULARY,
    build_gan,
    frozen_encoder,
    micro_batches,
    smooth_activations,
    synthetic_rows,
    tiny_config,
)

STEPS = 4

PAIRS = [(g, d) for g in range(4) for d in range(4)]
"""(generator's stage, discriminator's stage)"""


def train_engines(overrides: dict, steps: int = STEPS):
    """Losses of each step (averaged over ranks) and the final weights under DeepSpeed."""
    config = tiny_config(**overrides)
    with smooth_activations():
        return _train_engines(config, steps)


def _train_engines(config, steps: int):
    import torch.distributed as dist

    gan = build_gan(config, frozen_encoder() if config.text.mode == "frozen" else None)
    history = []
    for step in range(steps):
        batches = micro_batches(step * BATCH, config.engine.accumulation, dist.get_rank(), dist.get_world_size())
        metrics = gan.step(batches, step * BATCH, 1.0)
        names = sorted(metrics)
        values = torch.stack([metrics[name].float() for name in names])
        dist.all_reduce(values)
        history.append(dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True)))
    weights = {name: value for engine in gan.engines for name, value in engine.weights().items()}
    return history, weights


def train_reference(overrides: dict, steps: int = STEPS):
    from reference import Reference

    torch.set_num_threads(1)
    config = tiny_config(**overrides)
    reference = Reference(config, VOCABULARY, frozen_encoder() if config.text.mode == "frozen" else None)
    with smooth_activations():
        history = [reference.step(synthetic_rows(step * BATCH, BATCH), step * BATCH) for step in range(steps)]
    return history, reference.state()


def train_many(cases: dict[str, dict]) -> dict:
    """`train_engines` of every case in one process group; a failed case returns its traceback."""
    import traceback

    results = {}
    for name, overrides in cases.items():
        try:
            results[name] = train_engines(overrides)
        except Exception:
            results[name] = traceback.format_exc()
            break  # ranks may be out of step with each other now
    return results


def _stages(g: int, d: int, **more) -> dict:
    # A wide finite difference: a narrow one divides round-off by its width.
    penalty = {"loss__penalty": "fd_r1", "loss__penalty_sigma": 0.5} if d == 3 else {"loss__penalty": "r1"}
    return {"engine__generator_stage": g, "engine__discriminator_stage": d, **penalty, **more}


CASES = {
    **{f"stages {g} and {d}": _stages(g, d) for g, d in PAIRS},
    **{f"stages {g} and {d}, two micro-batches": _stages(g, d, engine__accumulation=2) for g, d in PAIRS},
    **{
        f"{mode} text, stage {s}, {a} micro-batch": _stages(s, s, text__mode=mode, engine__accumulation=a)
        for mode in ("shared", "frozen")
        for s in range(4)
        for a in (1, 2)
    },
    "ma_gp": _stages(2, 2, loss__penalty="ma_gp"),
    "ma_gp, joint, two micro-batches": _stages(
        1, 1, loss__penalty="ma_gp", model__discriminator__condition="joint", engine__accumulation=2
    ),
    "no penalty": _stages(3, 3, loss__penalty="none"),
    "transformer": _stages(2, 1, text__encoder="transformer"),
    "augmented": _stages(1, 2, augment__color=0.5, augment__cutout=0.3, augment__translation=0.2),
    "judged place by place": _stages(1, 2, model__discriminator__patches=8, engine__accumulation=2),
    "other places as negatives": _stages(
        2, 1, loss__region_negatives=3, model__discriminator__regions=(8, 4), engine__accumulation=2
    ),
    "words read and aligned, shared text, two micro-batches": _stages(
        3,
        2,
        text__mode="shared",
        model__generator__kind="attn",
        model__discriminator__words=8,
        engine__accumulation=2,
    ),
    "pixels, two micro-batches": _stages(2, 1, loss__pixels=3.0, augment__translation=0.2, engine__accumulation=2),
    "mode seeking": _stages(2, 1, loss__g_mode_seeking=0.3, augment__translation=0.2),
    "mode seeking, sharded, two micro-batches, shared text": _stages(
        3, 2, loss__g_mode_seeking=0.3, text__mode="shared", engine__accumulation=2
    ),
    "self-attention, skips and a mapping, sharded": _stages(
        3,
        2,
        model__generator__self_attention=(4,),
        model__generator__skips=True,
        model__generator__mapping=2,
        model__discriminator__self_attention=(4,),
        model__discriminator__skips=True,
    ),
    "hard wrong captions": _stages(2, 1, loss__mismatched_group=4),
    "hard wrong captions, judged by place, two micro-batches": _stages(
        1, 2, loss__mismatched_group=2, model__discriminator__patches=8, engine__accumulation=2
    ),
    "no regions": _stages(2, 2, model__discriminator__regions=()),
    "edits": _stages(1, 2, edit__width=8, loss__edit_target=3.0, augment__translation=0.2),
    "edits, sharded, two micro-batches": _stages(3, 1, edit__width=8, loss__edit_target=3.0, engine__accumulation=2),
    "decayed": _stages(0, 0, optimizer__weight_decay=0.1),
    **{f"clipped, stage {s}": _stages(s, s, optimizer__gradient_clipping=0.5) for s in range(4)},
    "offloaded": _stages(2, 2, engine__offload="cpu"),
    **{
        f"muon, stage {g}, {a} micro-batch": _stages(g, 1, optimizer__generator_matrices="muon", engine__accumulation=a)
        for g in range(4)
        for a in (1, 2)
    },
    "muon, decayed, clipped, edits": _stages(
        3,
        2,
        optimizer__generator_matrices="muon",
        optimizer__weight_decay=0.1,
        optimizer__gradient_clipping=0.5,
        edit__width=8,
    ),
    "muon, offloaded, shared text": _stages(
        2,
        2,
        optimizer__generator_matrices="muon",
        optimizer__muon_momentum=0.5,
        engine__offload="cpu",
        text__mode="shared",
    ),
}


@pytest.fixture(scope="module")
def trained():
    """Trains every case on two ranks, all in one process group, because starting a group takes longer than a case."""
    return run_ranks(2, train_many, CASES, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(trained, case):
    expected_history, expected = train_reference(CASES[case])
    for results in trained:
        assert case in results, f"not reached: a case before it failed: {list(results.values())[-1]}"
        assert not isinstance(results[case], str), results[case]
        history, weights = results[case]
        assert_close(history, weights, expected_history, expected)


def assert_close(history, weights, expected_history, expected, tolerance: float = 1e-6):
    """Losses and weights agree to `tolerance`, relative to their size (to 1 where they are smaller)."""
    for step, (got, want) in enumerate(zip(history, expected_history, strict=True)):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, name)
    assert set(weights) == set(expected)
    for name, value in expected.items():
        difference = (weights[name] - value).norm() / value.norm().clamp_min(1.0)
        assert difference <= tolerance, (name, float(difference))


@pytest.mark.slow
def test_one_process_of_deepspeed_is_plain_pytorch():
    overrides = _stages(1, 2, engine__accumulation=2)
    assert_close(*run_ranks(1, train_engines, overrides)[0], *train_reference(overrides))
