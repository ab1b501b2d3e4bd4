"""Attention backends: the same numbers from each, and clear words where one can't be used."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers import UNet2DConditionModel

from gigdiff.attention import BACKENDS, available_backends, choose, set_attention
from gigdiff.errors import InputError, MissingDependencyError


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8,
        attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def test_every_usable_backend_gives_the_same_output_and_gradients() -> None:
    unet, results = tiny_unet(), {}
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    for name, (usable, _) in available_backends().items():
        if not usable:
            continue
        assert set_attention(unet, name) == name
        unet.zero_grad()
        output = unet(x, 10, text).sample
        output.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in unet.parameters()])
        results[name] = (output.detach(), gradient)
    assert {"math", "sdpa"} <= set(results)
    for output, gradient in results.values():
        torch.testing.assert_close(output, results["math"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, results["math"][1], rtol=1e-3, atol=1e-5)


def test_auto_chooses_by_device_and_use() -> None:
    assert choose("cpu", training=True) == "math"
    assert choose("cpu", training=False) == choose("cuda", training=True) == "sdpa"
    assert set_attention(tiny_unet(), "auto") == "sdpa"


def test_unknown_and_unusable_backends_are_explained() -> None:
    with pytest.raises(InputError, match='did you mean "xformers"'):
        set_attention(tiny_unet(), "xformer")
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(MissingDependencyError, match=r"pip install 'gigdiff\[cuda\]'"):
            set_attention(tiny_unet(), "xformers")
    assert set(available_backends()) | {"auto"} == set(BACKENDS)
