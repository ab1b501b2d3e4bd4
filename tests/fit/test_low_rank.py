"""gigdiff.fit.low_rank: a network trained through the factors of its difference to another."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch.func import functional_call

from gigdiff.fit.low_rank import LowRankDifference
from gigdiff.lora import adaptable, leading_terms


def unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


def test_it_starts_as_the_nearest_network_of_that_rank_over_the_base() -> None:
    first, base = unet(0), unet(1)
    model = copy.deepcopy(first)
    LowRankDifference(model, base, 3, seed=0)
    layers = {f"{name}.weight" for name in adaptable(base)}
    for (name, now), theirs, before in zip(
        model.named_parameters(), base.parameters(), first.parameters(), strict=True
    ):
        if name not in layers:
            assert torch.equal(now, theirs) and not now.requires_grad, name
            continue
        singular = torch.linalg.svdvals((before - theirs).detach().flatten(1))
        assert torch.linalg.matrix_rank((now - theirs).detach().flatten(1), rtol=1e-4) == min(3, len(singular))
        off = (before - now).detach().square().sum()
        torch.testing.assert_close(off, singular[3:].square().sum(), rtol=1e-3, atol=1e-6, msg=name)


def test_its_gradients_are_those_of_the_factors_and_its_steps_move_the_network() -> None:
    model, base = unet(0), unet(1)
    difference = LowRankDifference(model, base, 2, seed=0)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)

    # The same by autograd, through weights that are made of the factors.
    names = [f"{name}.weight" for name in adaptable(base)]
    order = [name for name, _ in base.named_parameters() if name in set(names)]
    factors = [p.detach().clone().requires_grad_() for p in difference.parameters()]
    half = len(factors) // 2
    theirs = dict(base.named_parameters())
    weights = {
        name: theirs[name].detach() + (up @ down).view_as(theirs[name])
        for name, down, up in zip(order, factors[:half], factors[half:], strict=True)
    }
    with torch.no_grad():
        plain = model(z, t, text).sample
    made = functional_call(model, weights, (z, t, text)).sample
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)
    made.square().mean().backward()

    model(z, t, text).sample.square().mean().backward()
    difference.take_gradients()
    assert all(p.grad is None for p in model.parameters())
    for ours, expected in zip(difference.parameters(), factors, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-6)

    before = model(z, t, text).sample.square().mean().item()
    torch.optim.SGD(difference.parameters(), lr=0.05).step()
    assert model(z, t, text).sample.square().mean().item() == before  # until the factors are written
    difference.write()
    assert model(z, t, text).sample.square().mean().item() < before


def test_a_fused_optimizer_brings_it_nearer_to_another_network() -> None:
    """Factors lay in memory column after column, their gradients row after row: fused AdamW mixed the two up."""
    goal, base = unet(0), unet(1)
    model = copy.deepcopy(goal)
    difference = LowRankDifference(model, base, 2, seed=0)
    optimizer = torch.optim.AdamW(difference.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    torch.manual_seed(0)
    z, t, text = torch.randn(8, 4, 8, 8), torch.tensor([999] * 8), torch.randn(8, 5, 12)
    with torch.no_grad():
        wanted = goal(z, t, text).sample
    losses = []
    for _ in range(40):
        loss = (model(z, t, text).sample - wanted).square().mean()
        loss.backward()
        losses.append(loss.item())
        difference.take_gradients()
        optimizer.step()
        difference.write()
    assert losses[-1] < 0.5 * losses[0]


def test_where_nothing_differs_it_starts_as_the_base_and_can_leave_it() -> None:
    model, base = unet(1), unet(1)
    difference = LowRankDifference(model, base, 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    again = LowRankDifference(unet(1), base, 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(difference.down, again.down, strict=True))
    model(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12)).sample.square().mean().backward()
    difference.take_gradients()
    assert all(up.grad.abs().max() > 0 for up in difference.up)


def test_leading_terms_share_the_singular_values_between_both_factors() -> None:
    matrix = torch.randn(6, 9)
    down, up = leading_terms(matrix, 4)
    assert down.shape == (4, 9) and up.shape == (6, 4)
    torch.testing.assert_close(down @ down.t(), up.t() @ up, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leading_terms(matrix, 50)[1] @ leading_terms(matrix, 50)[0], matrix)
