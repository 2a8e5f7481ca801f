"""Muon's step alone: its effect on singular values, and its size compared with AdamW's."""

from __future__ import annotations

import pytest
import torch

from dist_t2i.distributed.optimizer import AdamWAndMuon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 30), (16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(1.0, 0.02, min(shape))
    got = orthogonalised(7.0 * (u * values) @ v)
    brought = u.T @ got @ v.T
    assert torch.allclose(brought, torch.diag(brought.diagonal()), atol=1e-4)
    assert brought.diagonal().min() > 0.65 and brought.diagonal().max() < 1.25


def test_zeros_and_sizes():
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))
    gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalised(gradient), orthogonalised(1e4 * gradient), atol=1e-5)


def test_a_step_has_the_size_of_adamws_and_biases_are_adamws():
    kernel = torch.nn.Parameter(torch.zeros(32, 3, 3, 16))
    bias = torch.nn.Parameter(torch.zeros(32))
    groups = [{"params": [kernel], "muon": True}, {"params": [bias], "muon": False}]
    optimizer = AdamWAndMuon(groups, momentum=0.9, lr=0.1, betas=(0.0, 0.99), weight_decay=0.0)
    for parameter in (kernel, bias):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert float(kernel.detach().square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.2)
    assert torch.allclose(bias, -0.1 * bias.grad.sign(), atol=1e-5)
    assert set(optimizer.state[kernel]) == {"step", "exp_avg"} and optimizer.param_groups[0]["params"] == [kernel]
