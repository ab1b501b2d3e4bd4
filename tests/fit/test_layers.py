"""gigdiff.fit.layers: what peft's and torch's layers compute, in training only, at less cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from gigdiff.attention import set_attention
from gigdiff.fit import convolutions, layers
from gigdiff.fit.layers import lighten, lora_product
from gigdiff.group_norm import quicken_group_norms
from gigdiff.lora import LoraSettings, add_adapter
from gigdiff.packing import pack
from gigdiff.precision import cpu_has_bfloat16

in_bfloat16 = pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU does not compute in bfloat16")
ALL = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")


def tiny_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    ).to(dtype)  # fmt: skip


def with_lora(model: Any, **changes: Any) -> dict[str, nn.Parameter]:
    settings = {"rank": 4, "lora_alpha": 6.0, "lora_dropout": 0.0, "target_modules": ALL, "use_dora": False}
    settings |= {"use_rslora": False, "init_lora_weights": "gaussian"} | changes
    parameters = add_adapter(model, LoraSettings(**settings), "a", 0)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in parameters.values():  # lora_B too, or half of the formulas would be of zeros
            p.copy_(torch.randn_like(p) * 0.2)
    return parameters


def trained(model: Any, dtype: torch.dtype, channels_last: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a network says to fixed inputs, and its gradients for its latents and its LoRA."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 4, 8, 8, generator=generator).to(model.dtype)
    text = torch.randn(3, 5, 24, generator=generator).to(model.dtype)
    weight = torch.randn(3, 4, 8, 8, generator=generator)
    z = z.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        said = model(z, torch.tensor([3, 300, 900]), encoder_hidden_states=text).sample
    (said.float() * weight).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = None
    assert z.grad is not None
    return said.detach(), z.grad, gradients


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_and_its_gradients_are_autograds_of_the_formula(bias: bool) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((2, 5, 7), (3, 7), (4, 3)))
    weight, offset = torch.randn(4, 7, dtype=torch.double), torch.randn(4, dtype=torch.double) if bias else None
    assert torch.autograd.gradcheck(lambda x, a, b: lora_product(x, weight, offset, a, b, 1.7), (x, a, b))
    plain = x @ weight.t() + (0 if offset is None else offset) + 1.7 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(lora_product(x, weight, offset, a, b, 1.7), plain)


def test_a_light_network_trains_as_the_plain_one_in_float32() -> None:
    plain = tiny_unet().train()
    with_lora(plain)
    light = copy.deepcopy(plain)
    lighten(light)
    assert sum(isinstance(m, layers._LoraLinear) for m in light.modules()) > 20
    ours, theirs = trained(light, torch.float32), trained(plain, torch.float32)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ours[2].keys() == theirs[2].keys() and len(ours[2]) > 40
    for name, gradient in ours[2].items():
        assert gradient.dtype == torch.float32 and error(gradient, theirs[2][name]) < 1e-4, name


@in_bfloat16
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_and_in_bfloat16_as_near_to_float32_as_the_plain_one(base: torch.dtype, channels_last: bool) -> None:
    """Against the same rounded weights in float32."""
    plain = tiny_unet(torch.bfloat16).to(base).train()
    with_lora(plain)
    exact = trained(copy.deepcopy(plain).float(), torch.float32)
    light = copy.deepcopy(plain)
    assert lighten(light)
    ours, theirs = trained(light, torch.bfloat16, channels_last), trained(plain, torch.bfloat16)
    assert sum(isinstance(m, layers._Geglu) for m in light.modules()) > 3
    frozen = [m for m in light.modules() if isinstance(m, convolutions.FrozenConv2d)]
    both_ways = [m for m in frozen if len(convolutions._LAID_OUT.get(m, {})) == 2]
    assert len(frozen) > 20 and len(both_ways) >= len(frozen) - 3
    for a, b, c in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        assert error(a, c) < 1.3 * error(b, c) < 0.1
    assert ours[2].keys() == theirs[2].keys()
    total = [sum(error(of[2][n], exact[2][n]) for n in exact[2]) / len(exact[2]) for of in (ours, theirs)]
    assert total[0] < 1.3 * total[1] < 0.2


@pytest.mark.parametrize("bias", [True, False])
def test_the_gate_and_its_gradients_are_autograds_of_the_formula(bias: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 5), (8, 5), (8,))]

    def gate(x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        return layers._GegluProduct.apply(x, weight, offset)

    given = given[: 3 if bias else 2]
    assert torch.autograd.gradcheck(gate, given)
    h, g = nn.functional.linear(*given).chunk(2, -1)
    torch.testing.assert_close(gate(*given), h * nn.functional.gelu(g))


@pytest.mark.parametrize("text", [True, False])
def test_attention_and_its_gradients_are_autograds_of_the_formula(text: bool) -> None:
    """Of unlike lengths and widths, so that nothing fits in another's place."""
    torch.manual_seed(0)
    shapes = ((2, 5, 7), (2, 3, 4), (6, 7), (6, 4), (6, 4)) if text else ((2, 5, 7), (6, 7), (6, 7), (6, 7))
    given = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes]

    def attended(x: Tensor, *rest: Tensor) -> Tensor:
        return layers._AttentionProduct.apply(x, *(rest if text else (None, *rest)), 3, 0.6)

    assert torch.autograd.gradcheck(attended, given)
    x, to_q, to_k, to_v = given[0], *given[-3:]
    t = given[1] if text else x
    q, k, v = (nn.functional.linear(a, w).unflatten(2, (3, 2)) for a, w in ((x, to_q), (t, to_k), (t, to_v)))
    p = torch.einsum("nlhd,nmhd->nhlm", q, k).mul(0.6).softmax(-1)
    torch.testing.assert_close(attended(*given), torch.einsum("nhlm,nmhd->nlhd", p, v).flatten(2))


def test_a_frozen_attentions_gradient_is_for_its_input_alone() -> None:
    torch.manual_seed(0)
    x, text, *weights = (torch.randn(*s) for s in ((2, 5, 8), (2, 3, 4), (6, 8), (6, 4), (6, 4)))
    for t in (x, text):
        t.requires_grad_()
    layers._AttentionProduct.apply(x, text, *weights, 2, 0.5).sum().backward()
    assert x.grad is not None and text.grad is not None and all(w.grad is None for w in weights)


@in_bfloat16
def test_in_evaluation_it_is_bit_by_bit_the_plain_one() -> None:
    plain = tiny_unet(torch.bfloat16)
    with_lora(plain)
    light = copy.deepcopy(plain)
    lighten(light)
    trained(light, torch.bfloat16)
    with torch.no_grad():
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z, text = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 5, 24).bfloat16()
                said = [m(z, torch.tensor(300), encoder_hidden_states=text).sample for m in (light, plain)]
            assert torch.equal(*said)
    assert light.state_dict().keys() == plain.state_dict().keys()


@in_bfloat16
def test_changed_weights_are_computed_with_in_both_directions() -> None:
    light = tiny_unet(torch.bfloat16).train()
    with_lora(light)
    lighten(light)
    before = trained(light, torch.bfloat16)
    with torch.no_grad():
        for module in light.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(0.7)
    after = trained(light, torch.bfloat16)
    fresh = tiny_unet(torch.bfloat16).train()
    with_lora(fresh)
    with torch.no_grad():
        for module in fresh.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(0.7)
    lighten(fresh)
    expected = trained(fresh, torch.bfloat16)
    assert not torch.equal(before[1], after[1])
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_what_is_more_than_a_plain_lora_stays_pefts(changes: dict[str, Any]) -> None:
    plain = tiny_unet().train()
    with_lora(plain, **changes)
    light = copy.deepcopy(plain)
    lighten(light)
    torch.manual_seed(5)
    ours = trained(light, torch.float32)
    torch.manual_seed(5)
    theirs = trained(plain, torch.float32)
    assert torch.equal(ours[0], theirs[0]) and all(torch.equal(ours[2][n], theirs[2][n]) for n in theirs[2])
    light.disable_adapters()
    plain.disable_adapters()
    with torch.no_grad():
        z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
        assert torch.equal(*(m(z, 5, encoder_hidden_states=text).sample for m in (light, plain)))


def test_only_so_much_memory_is_taken_for_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "can_pack", lambda: True)
    monkeypatch.setattr(layers, "PACKED_BYTES", 4 * 40_000)
    light = tiny_unet().requires_grad_(False)
    assert not lighten(light)
    kept = [m for m in light.modules() if isinstance(m, convolutions.FrozenConv2d)]
    assert kept and sum(m.weight.numel() for m in kept) <= 40_000
    assert len(kept) < sum(isinstance(m, nn.Conv2d) for m in light.modules())


def whole(model: Any, channels_last: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.requires_grad_(True)
    return trained(model, torch.bfloat16, channels_last)


@in_bfloat16
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_a_whole_network_trains_as_near_to_float32_as_the_plain_one(
    attention: str, packed: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in float32, under autocast; `packed`: taken from a generator, as a student is."""
    plain = tiny_unet().train()
    set_attention(plain, attention, training=True, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(p.bfloat16())
    exact = trained(copy.deepcopy(plain), torch.float32)
    light = copy.deepcopy(plain)
    if packed:
        pack(light)
    assert not lighten(light)
    assert sum(isinstance(m, convolutions.TrainedConv2d) for m in light.modules()) > 20
    assert sum(isinstance(m, layers._Geglu) for m in light.modules()) > 3
    attentions: list[Tensor] = []
    monkeypatch.setattr(layers, "_heads", lambda x, *rest, heads=layers._heads: attentions.append(x) or heads(x, *rest))
    ours, theirs = whole(light, channels_last), whole(plain, channels_last)
    assert len(attentions) == (3 * 7 if attention == "math" else 0)  # of each block: x, and x and text
    for a, b, c in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        assert error(a, c) < 1.3 * error(b, c) < 0.1
    assert ours[2].keys() == theirs[2].keys() == exact[2].keys()
    ratios = []
    for name, gradient in ours[2].items():
        assert gradient.dtype == torch.float32 and gradient.shape == theirs[2][name].shape
        a, b = (error(g, exact[2][name]) for g in (gradient, theirs[2][name]))
        ratios.append(a / b)
        assert a < 2.5 * b + 2e-3, name  # few numbers each: by chance alone 0.5 to 1.9 times
    assert 0.8 < sorted(ratios)[len(ratios) // 2] < 1.1


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (3, 1, (0, 1))])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [4, 2])  # more and fewer than come in
def test_a_convolutions_gradients_are_autograds(
    kernel: int, stride: int, padding: Any, bias: bool, channels: int
) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(2, 3, 5, 4), torch.randn(channels, 3, kernel, kernel), torch.randn(channels)
    given = [t.double().requires_grad_() for t in ((x, weight, offset) if bias else (x, weight))]
    stride, padding = (stride, stride), padding if isinstance(padding, tuple) else (padding, padding)

    def convolved(x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        return convolutions._TrainedConvolution.apply(x, weight, offset, stride, padding)

    assert torch.autograd.gradcheck(convolved, given)
    assert torch.equal(convolved(*given), nn.functional.conv2d(*given, stride=stride, padding=padding))


@in_bfloat16
def test_a_trained_network_draws_the_bits_of_a_packed_one() -> None:
    """As a preview of training does, against the saved model."""
    light = tiny_unet().train().to(memory_format=torch.channels_last)
    lighten(light)
    whole(light, channels_last=True)
    saved = tiny_unet().to(memory_format=torch.channels_last)
    quicken_group_norms(saved)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
        text = torch.randn(2, 5, 24)
        drawn = [m(z, torch.tensor(300), encoder_hidden_states=text).sample for m in (light.eval(), saved.eval())]
    assert torch.equal(*drawn)
