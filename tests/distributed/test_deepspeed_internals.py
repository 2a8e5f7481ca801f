"""The undocumented parts of DeepSpeed and torch that dist_t2i.distributed.engine lists, each with a test.

A test fails when a new version of the library changes the part that it names.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ranks import run_ranks


def small_engine(stage: int, precision: str = "fp32"):
    """An engine of two parameters under ZeRO. They have 15 and 5 numbers, which two ranks cannot share equally."""
    from dist_t2i.config.sections import OptimizerConfig
    from dist_t2i.distributed.engine import EngineSpec, NetworkEngine, init_distributed

    init_distributed(torch.device("cpu"))
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"generator": torch.nn.Linear(3, 5)})
    spec = EngineSpec("generator", stage, 2, 1, precision, 1e-3, {})
    return NetworkEngine(module, spec, replace(OptimizerConfig(), generator_matrices="muon"), torch.device("cpu"))


def masters_hold_the_pieces(stage: int) -> list[str]:
    """Compares every piece of a flat master with the same part of the full parameter."""
    engine = small_engine(stage)
    with engine.gathered() as parameters:
        full = {id(p): parameters[name].detach().float().flatten().clone() for name, p in engine._parameters.items()}
    problems = []
    for master, parameters in zip(engine._flat_masters(), engine._parameters_of_masters(), strict=True):
        for parameter in parameters:
            piece = engine._piece(parameter)
            part = full[id(parameter)][piece.first :][: piece.size]
            if not torch.equal(master.detach().flatten()[piece.offset :][: piece.size], part):
                problems.append(f"stage {stage}: {piece}")
            if tuple(piece.shape) not in {(5, 3), (5,)}:
                problems.append(f"stage {stage}: a shape of {tuple(piece.shape)}")
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flat_masters_and_the_pieces_in_them(stage):
    """bit16_groups, fp16_groups, the flat masters, _hp_mapping, grad_position, get_param_id, ds_shape and ds_numel."""
    assert run_ranks(2, masters_hold_the_pieces, stage) == [[], []]


def split_parameters() -> list[tuple]:
    parameters = small_engine(3)._parameters.values()
    return [(tuple(p.ds_shape), p.ds_numel, p.ds_tensor.numel()) for p in parameters]


@pytest.mark.slow
def test_split_parameters_have_their_full_shape_and_this_ranks_padded_piece():
    """ds_shape, ds_numel and ds_tensor."""
    assert run_ranks(2, split_parameters) == [[((5, 3), 15, 8), ((5,), 5, 3)]] * 2


def moments_before_a_step(stage: int) -> list[bool]:
    engine = small_engine(stage)
    moments = engine.optimizer_state()
    return [value is not None and not value.any() for value in moments.values()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_moments_are_known_before_the_first_step(stage):
    """_lazy_init_hp_params_optimizer_state."""
    assert run_ranks(2, moments_before_a_step, stage) == [[True] * 3] * 2  # Muon: one moment; the bias: two


def flags_and_counters() -> list[str]:
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    problems = []
    for stage in (1, 2, 3):
        engine = small_engine(stage, "fp16")
        engine._zero._remaining_grad_acc_hooks = 0
        engine._zero.clear_backward_seen_flag()
        scaler = vars(engine._zero.loss_scaler)
        if not {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} <= scaler.keys():
            problems.append(f"stage {stage}: loss_scaler has {sorted(scaler)}")
        engine._zero.loss_scaler.cur_scale = 64.0
        if engine.loss_scale != 64.0:
            problems.append(f"stage {stage}: the loss scale is not loss_scaler.cur_scale")
        engine._engine.skipped_steps = 7
        if engine.skipped_steps != 7 or engine.counters()["skipped_steps"] != 7:
            problems.append(f"stage {stage}: skipped_steps cannot be set")
    if deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is not False:
        problems.append("__compatible_ops__ has lost deepspeed_shm_comm")
    return problems


@pytest.mark.slow
def test_flags_and_counters_of_fp16():
    """clear_backward_seen_flag, loss_scaler, skipped_steps and __compatible_ops__ (test_engine.py checks its effect)."""
    assert run_ranks(1, flags_and_counters) == [[]]


def test_what_torch_says_of_the_processor():
    from_torch = (
        torch.cpu._is_avx512_bf16_supported(),
        torch.cpu._is_amx_tile_supported(),
        torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    )
    assert all(isinstance(answer, bool) for answer in from_torch)


def test_torch_compile_can_be_turned_off():
    from dist_t2i.distributed.engine import _without_compiler

    def function(x):
        return x + 1

    with _without_compiler():
        assert torch.compile(function) is function


def test_adamw_steps_the_groups_in_param_groups():
    kept, hidden = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [kept]}, {"params": [hidden]}], lr=0.1)
    kept.grad, hidden.grad = torch.ones(2), torch.ones(2)
    optimizer.param_groups = optimizer.param_groups[:1]
    optimizer.step()
    assert kept.abs().sum() > 0 and hidden.abs().sum() == 0
