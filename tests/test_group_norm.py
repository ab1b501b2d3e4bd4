"""gigdiff.group_norm: torch's numbers, by way of float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gigdiff.generators.loading import load
from gigdiff.group_norm import quicken_group_norms
from gigdiff.precision import cpu_has_bfloat16


def norms(channels: int, weights: torch.dtype = torch.float32) -> tuple[nn.GroupNorm, nn.GroupNorm]:
    torch.manual_seed(0)
    plain = nn.GroupNorm(8, channels).to(weights)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_()
    quick = copy.deepcopy(plain)
    quicken_group_norms(quick)
    return plain, quick


def picture(channels: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [32, 48, 128, 160], ids=lambda c: f"{c // 8} a group")
@pytest.mark.parametrize("size", [4, 31, 32], ids=lambda s: f"{s * s} places")
def test_output_and_gradients_are_those_of_float64_rounded(size: int, channels: int, weights: torch.dtype) -> None:
    plain, quick = norms(channels, weights)
    exact, x = copy.deepcopy(plain).double(), picture(channels, size)
    with torch.no_grad():
        drawn = quick(x)
    rooms = [x.double().requires_grad_(), x.clone().requires_grad_()]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    said = [norm(room) for norm, room in zip((exact, quick), rooms, strict=True)]
    for output in said:
        (output * weight.to(output.dtype)).sum().backward()
    assert drawn.dtype == said[1].dtype == rooms[1].dtype and torch.equal(drawn, said[1])
    assert said[1].is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in (*zip(said[::-1], (said[0],), strict=False), (rooms[1].grad, rooms[0].grad)):
        assert (ours.double() - theirs).norm() < 4e-3 * theirs.norm()
    for p, q in zip(quick.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == weights and (p.grad.double() - q.grad).norm() < 4e-3 * q.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_torch_is_quick_at_is_left_to_it(dtype: torch.dtype) -> None:
    plain, quick = norms(48)
    x = picture(48, 4, dtype)
    others = [x.contiguous(), x.flatten(2)] if dtype == torch.bfloat16 else [x]
    for other in others:
        assert torch.equal(quick(other), plain(other))
    frozen = copy.deepcopy(quick).requires_grad_(False)
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None and frozen.weight.grad is None


def test_an_image_has_the_same_bits_alone_and_in_a_batch() -> None:
    _, quick = norms(48)
    x = picture(48, 10)
    with torch.no_grad():
        assert torch.equal(quick(x)[1:2], quick(x[1:2].contiguous(memory_format=torch.channels_last)))


def test_no_copy_in_float32_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.dtype] = []
    _, quick = norms(48)
    x = picture(48, 10).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.dtype) if t.dim() == 4 else None, lambda t: t
    ):
        quick(x)
    assert kept == [torch.bfloat16]


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU does not compute in bfloat16")
def test_the_embedded_models_draw_by_them() -> None:
    unet = load("mini").unet  # type: ignore[attr-defined]
    assert (
        sum(type(m) is nn.GroupNorm for m in unet.modules())
        == 0
        < sum(isinstance(m, nn.GroupNorm) for m in unet.modules())
    )
