"""One network under ZeRO: its state is saved and loaded at every stage and precision, and engine.py's settings work."""

from __future__ import annotations

import pytest
import torch

from dist_t2i.distributed.engine import deepspeed_config, effective_stage, native_precision, resolve_precision
from dist_t2i.errors import CheckpointError, ConfigError
from ranks import run_ranks

CPU = torch.device("cpu")


def test_gradient_clipping_is_always_written():
    """DeepSpeed clips at 1.0 if its configuration has no value."""
    from dist_t2i.distributed.engine import EngineSpec

    for stage in range(4):
        spec = EngineSpec("g", stage, 4, 1, "fp32", 1e-3, {})
        assert deepspeed_config(spec, 0.0, 2, 1000)["gradient_clipping"] == 0.0


def test_precision_is_what_the_device_computes_natively():
    assert resolve_precision("auto", CPU) == native_precision(CPU)
    assert resolve_precision("bf16", CPU) == "bf16"
    assert effective_stage(0, "bf16") == 1 and effective_stage(0, "fp32") == 0


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this processor computes fp16")
def test_fp16_without_hardware_is_a_configuration_error():
    with pytest.raises(ConfigError, match="fp16"):
        resolve_precision("fp16", CPU)


def round_trips(precision: str, optimizer: str) -> list[str]:
    """For every stage: train, save the state, continue. Load the state into a new GAN of each stage, continue, and
    compare."""
    import torch.distributed as dist

    from dist_t2i.distributed.engine import DTYPES
    from small_gan import BATCH, build_gan, micro_batches, tiny_config

    if precision == "fp16":  # DeepSpeed refuses it here although torch can emulate it, which is enough for a test
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: True

    def config(stage: int):
        return tiny_config(
            engine__generator_stage=stage,
            engine__discriminator_stage=stage,
            engine__precision=precision,
            optimizer__generator_matrices=optimizer,
            loss__penalty="none" if stage == 3 else "r1",
            text__mode="shared",
        )

    def steps(gan, first: int, count: int):
        for step in range(first, first + count):
            gan.step(micro_batches(step * BATCH, 1, dist.get_rank(), dist.get_world_size()), step * BATCH, 1.0)

    def state(gan):
        return [(e.weights(), e.optimizer_state(), e.counters()) for e in gan.engines]

    problems = []
    for stage in range(4):
        gan = build_gan(config(stage))
        steps(gan, 0, 2)
        taken = state(gan)
        steps(gan, 2, 2)
        after = state(gan)
        for other in (stage, (stage + 1) % 4):
            fresh = build_gan(config(other))
            for engine, parts in zip(fresh.engines, taken, strict=True):
                engine.load_state(*parts)
            for (w, m, c), (w0, m0, c0) in zip(state(fresh), taken, strict=True):
                same = all(torch.equal(w[n], w0[n]) for n in w0) and all(torch.equal(m[n], m0[n]) for n in m0)
                if not same or c != c0:
                    problems.append(f"{precision}: state of stage {stage} changed on its way through stage {other}")
            lowered = [p.dtype for e in fresh.engines for p in e.module.parameters()]
            if set(lowered) != {DTYPES[precision]}:
                problems.append(f"{precision}, stage {other}: parameters are {set(lowered)}")
            if other == stage:
                steps(fresh, 2, 2)
                for (w, m, _), (w0, m0, _) in zip(state(fresh), after, strict=True):
                    if not all(torch.equal(w[n], w0[n]) for n in w0) or not all(torch.equal(m[n], m0[n]) for n in m0):
                        problems.append(f"{precision}: stage {stage} goes on differently after a load")
        if not all(bool(torch.isfinite(t).all()) for w, *_ in after for t in w.values()):
            problems.append(f"{precision}, stage {stage}: not finite")
        if any(e.non_finite_groups() for e in gan.engines):
            problems.append(f"{precision}, stage {stage}: non_finite_groups names finite ones")
    from deepspeed.comm import comm

    if getattr(comm.cdb, "shm_comm_op", None) is not None:
        problems.append("the shared-memory op was compiled: the switch in init_distributed no longer works")
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_out_and_in_bitwise_at_every_stage(precision, optimizer):
    for problems in run_ranks(2, round_trips, precision, optimizer):
        assert problems == []


def broken_group() -> list[list[str]]:
    """For a NaN in one tensor, at every stage, the right group is named."""
    from small_gan import build_gan, tiny_config

    named = []
    for stage in range(4):
        gan = build_gan(
            tiny_config(engine__generator_stage=stage, engine__discriminator_stage=stage, loss__penalty="none")
        )
        engine = gan.discriminator
        weights = engine.weights()
        weights["text_d.lstm.bias_ih_l0"][3] = float("nan")
        engine.load_state(weights, engine.optimizer_state(), engine.counters())
        named.append(engine.non_finite_groups())
    return named


@pytest.mark.slow
def test_the_group_that_is_not_finite_is_named():
    for named in run_ranks(2, broken_group):
        assert named == [["text_d"]] * 4


def misfits() -> list[str]:
    """Loading the state of other networks gives clear errors: another shape at stage 0, a missing moment at stage 3."""
    from small_gan import build_gan, tiny_config

    said = []
    for stage, name in ((0, "text_d.embedding.weight"), (3, "text_d.embedding.weight.exp_avg_sq")):
        stages = {"engine__generator_stage": stage, "engine__discriminator_stage": stage}
        engine = build_gan(tiny_config(**stages, loss__penalty="none")).discriminator
        state = engine.weights() | engine.optimizer_state()
        if stage:
            del state[name]
        else:
            state[name] = torch.zeros(3, 2)
        try:
            engine.load_state(state, state, engine.counters())
        except CheckpointError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_the_state_of_other_networks_is_refused_by_name():
    for shape, missing in run_ranks(2, misfits):
        assert "text_d.embedding.weight of the discriminator's engine is (3, 2), but must be (40, 16)" in shape
        assert "text_d.embedding.weight.exp_avg_sq" in missing and "not in the checkpoint" in missing
