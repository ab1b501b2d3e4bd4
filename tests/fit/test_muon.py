"""MuonAdamW against torch's own two optimizers, and what orthogonalising means."""

import copy

import pytest
import torch
from torch import nn

from gigdiff.fit.checkpoint import load_optimizer, optimizer_tensors
from gigdiff.fit.muon import MuonAdamW, orthogonalised


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))


def run(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for step in range(steps):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_equals_torchs_muon_and_adamw():
    ours, theirs = network(), network()
    run(ours, [MuonAdamW(ours.named_parameters(), 0.02, outer=("0.", "4."), weight_decay=0.1, dtype=torch.bfloat16)], 5)
    muon = torch.optim.Muon([theirs[2].weight], 0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs.parameters() if p is not theirs[2].weight]
    run(theirs, [muon, torch.optim.AdamW(rest, 0.02, betas=(0.9, 0.99), weight_decay=0.1)], 5)
    before = network()
    for a, b, start in zip(ours.parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_orthogonalised_is_nearly_u_vt(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalised(matrix)
    assert made.shape == matrix.shape
    assert torch.linalg.svdvals(made).min() > 0.6 and torch.linalg.svdvals(made).max() < 1.3
    # The directions are kept: U^T made V is diagonal.
    inner = u.T @ made @ vt.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


def test_a_convolution_is_the_matrix_of_its_output_channels_in_any_memory_layout():
    plain = nn.Conv2d(4, 8, 3, bias=False)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    linear = nn.Linear(36, 8, bias=False)
    linear.weight.data = plain.weight.data.flatten(1).clone()
    grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    for layer, g in ((plain, grad), (last, grad.to(memory_format=torch.channels_last)), (linear, grad.flatten(1))):
        layer.weight.grad = g.clone()
        MuonAdamW(layer.named_parameters(), 0.1).step()
    torch.testing.assert_close(plain.weight, last.weight)
    torch.testing.assert_close(plain.weight.flatten(1), linear.weight)


def test_goes_on_from_its_saved_state():
    """Bit for bit through a file's plain memory layout, with convolutions in channels_last."""

    def convolutions() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
        return net.to(memory_format=torch.channels_last)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build(net: nn.Module) -> MuonAdamW:
        return MuonAdamW(net.named_parameters(), 0.02, outer=("0.",))

    whole, first = convolutions(), convolutions()
    train(whole, build(whole), range(6))
    optimizer = build(first)
    train(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    second = copy.deepcopy(first)
    resumed = build(second)
    load_optimizer(resumed, saved)
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
