"""Blockwise attention against SDPA in float64, where it takes tiles and where it is one product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigdiff import blockwise_attention as module
from gigdiff.attention import set_attention
from gigdiff.blockwise_attention import Blockwise, blockwise_attention

# (batch, heads), queries, keys, head size: tiles with a rest and an odd head, one tile, one product of all heads
SHAPES = [((1, 3), 2500, 300, 8), ((2, 1), 1024, 700, 40), ((2, 3), 50, 77, 16)]


@pytest.fixture(autouse=True)
def little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first two shapes take tiles."""
    monkeypatch.setattr(module, "KEPT_BYTES", 2**20)
    monkeypatch.setattr(module, "KEPT_BYTES_AMX", 2**20)


def inputs(shape: tuple, dtype: torch.dtype) -> list[Tensor]:
    leading, queries, keys, size = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(*leading, n, size) for n in (queries, keys, keys))
    return [(2 * q).to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()]


def output_and_gradients(attend, tensors: list[Tensor], weight: Tensor, **kwargs) -> list[Tensor]:
    output = attend(*tensors, **kwargs)
    return [output.detach(), *torch.autograd.grad(output, tensors, weight.to(output.dtype))]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_sdpa_in_float64(shape: tuple, scale: float | None) -> None:
    tensors = inputs(shape, torch.float32)
    weight = torch.randn_like(tensors[0])
    exact = output_and_gradients(
        F.scaled_dot_product_attention, [x.detach().double().requires_grad_() for x in tensors], weight, scale=scale
    )
    for found, expected in zip(
        output_and_gradients(blockwise_attention, tensors, weight, scale=scale), exact, strict=True
    ):
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("amx", [True, False], ids=["as with AMX", "as without"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_as_near_as_plain_attention(shape: tuple, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_has_amx", lambda: amx)
    tensors = inputs(shape, torch.bfloat16)
    weight = torch.randn_like(tensors[0])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    exact = output_and_gradients(plain, [x.detach().double().requires_grad_() for x in tensors], weight)
    ours = output_and_gradients(blockwise_attention, tensors, weight)
    theirs = output_and_gradients(plain, tensors, weight)
    for found, other, expected in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, expected) < min(0.02, 1.3 * relative(other, expected) + 1e-3)


def test_probabilities_that_take_little_memory_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(SHAPES[0], torch.float32)
    weight = torch.randn_like(tensors[0])
    tiles = output_and_gradients(blockwise_attention, tensors, weight)
    monkeypatch.setattr(module, "KEPT_BYTES", 3 * 2500 * 300 * 4)
    monkeypatch.setattr(module._Tiles, "apply", lambda *_: pytest.fail("tiles"))
    for a, b in zip(output_and_gradients(blockwise_attention, tensors, weight), tiles, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient_and_nothing_is_kept_without() -> None:
    q, k, v = inputs(SHAPES[1], torch.float32)
    blockwise_attention(q.detach(), k, v.detach()).sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None
    with torch.no_grad():
        assert blockwise_attention(q, k, v).grad_fn is None


def test_the_processor_routes_plain_calls_and_leaves_others_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "blockwise_attention", lambda *args: calls.append(args) or blockwise_attention(*args))
    q, k, v = (x.detach() for x in inputs(SHAPES[2], torch.float32))
    mask = torch.zeros(50, 77)
    mask[:, 3:] = -torch.inf

    def processor(attn: None, **options) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    routed = Blockwise(processor)
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        assert torch.equal(routed(None, **options), processor(None, **options)) and not calls
    torch.testing.assert_close(routed(None, scale=0.3), processor(None, scale=0.3))
    assert len(calls) == 1
    processor(None)
    assert len(calls) == 1, "outside of the processor nothing is changed"


def test_activations_that_are_computed_again_are_routed_again() -> None:
    """Under gradient checkpointing the backward pass calls the processors once more."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, attention_head_dim=2, norm_num_groups=8,
    ).train()  # fmt: skip
    x, text, found = torch.randn(1, 4, 32, 32), torch.randn(1, 5, 8), []
    for backend, again in (("sdpa", False), ("blockwise", False), ("blockwise", True)):
        set_attention(unet, backend)
        if again:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(x, 5, text).sample.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert torch.equal(found[1], found[2])
    assert 0 < relative(found[1], found[0].double()) < 1e-5
