"""What only a GPU can show: its attention kernels, and that it draws what the CPU draws. Without one all is skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

import gigdiff
from gigdiff import attention
from gigdiff.attention import KERNELS, available_backends, set_attention
from gigdiff.cuda_graphs import GraphedNetwork
from gigdiff.models.upscaler import ProductUpscaler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def why_no_xformers() -> str:
    """ "" where xformers has kernels for this GPU."""
    usable, reason = available_backends()["xformers"]
    return attention._refusal("xformers", torch.device("cuda"), torch.float16, 64, True) if usable else reason


WHY_NOT = why_no_xformers()
needs_xformers = pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)
BACKENDS = ["sdpa", *KERNELS, "math", "sliced", pytest.param("xformers", marks=needs_xformers)]


def relative(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||, in float64 on the CPU."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return float((x - reference).norm() / reference.norm())


def reference_attention(layer: Attention, x: Tensor, text: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out."""
    source, heads = x if text is None else text, layer.heads

    def split(y: Tensor) -> Tensor:
        return y.reshape(y.shape[0], y.shape[1], heads, -1).permute(0, 2, 1, 3)

    q, k, v = split(layer.to_q(x)), split(layer.to_k(source)), split(layer.to_v(source))
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return layer.to_out[0](torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [None, 33], ids=["self", "text"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_those_of_float64_attention(backend: str, keys: int | None, dtype: Any) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=192, cross_attention_dim=None if keys is None else 64, heads=4, dim_head=48)
    with torch.no_grad():  # sharper than at initialisation, so that attention is far from an average
        layer.to_q.weight *= 3
        layer.to_k.weight *= 3
    layer = layer.to(dtype)  # rounded before it is copied: the kernels are measured, not the rounding of weights
    x = torch.randn(3, 80, 192).to(dtype)
    text = None if keys is None else torch.randn(3, keys, 64).to(dtype)
    weight = torch.randn(3, 80, 192)

    exact, x64 = copy.deepcopy(layer).double(), x.double().requires_grad_()
    expected = reference_attention(exact, x64, None if text is None else text.double())
    (expected * weight).sum().backward()

    layer = layer.cuda()
    layer.set_processor(attention._processor(backend))
    x_cuda = x.cuda().requires_grad_()
    output = layer(x_cuda, encoder_hidden_states=None if text is None else text.cuda())
    (output.float() * weight.cuda()).sum().backward()
    least = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert relative(output, expected) < least
    assert relative(x_cuda.grad, x64.grad) < least
    assert relative(layer.to_q.weight.grad, exact.to_q.weight.grad) < 2 * least


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def tiny_sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=32,
    )  # fmt: skip


def say(model: Any, dtype: torch.dtype, device: str) -> Tensor:
    """What a model says to fixed inputs."""
    torch.manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    if isinstance(model, UNet2DConditionModel):
        return model(normal(2, 4, 8, 8), torch.tensor([10, 700], device=device), normal(2, 5, 16)).sample
    if isinstance(model, SD3Transformer2DModel):
        at = torch.tensor([500], device=device)
        return model(normal(1, 4, 16, 16), normal(1, 5, 32), normal(1, 32), at).sample
    ids = (torch.arange(36.0).reshape(12, 3) % 4).to(device)
    return model(
        normal(1, 12, 16), normal(1, 5, 32), normal(1, 16), torch.tensor([0.5], device=device, dtype=dtype),
        img_ids=ids, txt_ids=torch.zeros(5, 3, device=device), guidance=torch.tensor([3.5], device=device),
    ).sample  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [tiny_unet, tiny_flux, tiny_sd3])
def test_models_on_each_backend_say_what_they_say_in_float32_on_the_cpu(build: Callable[[], Any], backend: str) -> None:
    if build is not tiny_unet and backend == "sliced":
        pytest.skip("sliced is for UNets")
    if build is not tiny_unet and backend == "xformers":
        pytest.skip("heads of at least 32: next test")
    model = build().eval().to(torch.bfloat16)
    with torch.no_grad():
        expected = say(copy.deepcopy(model).float(), torch.float32, "cpu")
        model = model.cuda()
        assert set_attention(model, backend) == backend
        assert relative(say(model, torch.bfloat16, "cuda"), expected) < 5e-2


@needs_xformers
def test_transformers_take_xformers() -> None:
    """With heads of 64, as the real ones have or nearly: some of its kernels take none below 32."""
    sd3 = {**tiny_sd3().config, "attention_head_dim": 64, "caption_projection_dim": 128}
    flux = {**tiny_flux().config, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    for model in (SD3Transformer2DModel.from_config(sd3), FluxTransformer2DModel.from_config(flux)):
        model = model.eval().to(torch.bfloat16)
        with torch.no_grad():
            expected = say(copy.deepcopy(model).float(), torch.float32, "cpu")
            model = model.cuda()
            assert set_attention(model, "xformers") == "xformers"
            assert relative(say(model, torch.bfloat16, "cuda"), expected) < 5e-2


def test_a_kernel_that_cannot_do_a_model_is_refused_with_the_reason() -> None:
    model = tiny_unet().cuda()
    for backend in ("sdpa_flash", "sdpa_cudnn"):
        with pytest.raises(gigdiff.errors.InputError, match=r"float16 and bfloat16, and the model in float32"):
            set_attention(model, backend)
    assert set_attention(model, "sdpa_efficient") == "sdpa_efficient"


def test_auto_measures_every_kernel_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cache_file", lambda: tmp_path / "attention.json")
    model = tiny_unet().to("cuda", torch.bfloat16)
    chosen = set_attention(model, "auto")
    assert available_backends()[chosen][0]
    seconds = next(iter(attention._read(tmp_path / "attention.json").values()))["seconds"]
    assert set(seconds) == {"sdpa", *KERNELS} | (set() if WHY_NOT else {"xformers"})
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured again"))
    assert set_attention(model, "auto") == chosen


def psnr(a: Any, b: Any) -> float:
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize(("dtype", "least"), [("float32", 45.0), ("bfloat16", 30.0), ("float16", 35.0)])
def test_a_picture_is_the_one_that_the_cpu_draws(tiny_model: Path, dtype: str, least: float) -> None:
    settings = {"seed": 3, "num_images_per_prompt": 3, "upscale": False}
    there = gigdiff.generate("red coat", model=gigdiff.load(str(tiny_model), device="cpu", dtype="float32"), **settings)
    here = gigdiff.generate("red coat", model=gigdiff.load(str(tiny_model), device="cuda", dtype=dtype), **settings)
    assert all(psnr(a, b) > least for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_gives_what_its_network_gives_at_each_shape(dtype: Any) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3)).cuda()
    graphed = GraphedNetwork(network.eval(), dtype)
    graphed.refresh()
    least = 1e-6 if dtype == torch.float32 else 2e-2
    for size in (1, 4, 1, 2, 4, 1):  # in turn: one recording must not write over another's output
        x = torch.randn(size, 3, 8, 8).cuda()
        first = graphed(x)
        kept = first.clone()
        assert relative(first, network(x)) < least
        graphed(torch.randn(size, 3, 8, 8))  # from the CPU, too
        assert torch.equal(first, kept)
    assert len(graphed._recorded) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_changed_are_drawn_with(tiny_model: Path, dtype: str) -> None:
    """Previews in training draw with weights that an optimizer changes in place."""
    settings = {"seed": 3, "num_images_per_prompt": 2, "upscale": False}
    generator: Any = gigdiff.load(str(tiny_model), device="cuda", dtype=dtype)
    before = gigdiff.generate("red coat", model=generator, **settings)
    assert generator._graphed[0]._recorded and generator._graphed[1]._recorded
    with torch.no_grad():
        for x in generator.unet.parameters():
            x.mul_(1.1)
    changed = gigdiff.generate("red coat", model=generator, **settings)
    assert np.abs(np.asarray(changed[0], float) - np.asarray(before[0], float)).max() > 0
    with torch.no_grad():
        for x in generator.unet.parameters():
            x.div_(1.1)
    again = gigdiff.generate("red coat", model=generator, **settings)
    assert all(psnr(a, b) > 45 for a, b in zip(again, before, strict=True))


def test_a_lora_is_drawn_without_graphs_and_leaves_no_trace(tiny_model: Path, tmp_path: Path) -> None:
    generator: Any = gigdiff.load(str(tiny_model), device="cuda")
    trained = copy.deepcopy(generator.unet)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(trained))
    settings = {"seed": 3, "upscale": False}
    before = np.asarray(gigdiff.generate("red coat", model=generator, **settings))
    lora = gigdiff.generate("red coat", model=generator, lora=str(tmp_path), lora_scale=4.0, **settings)
    assert (np.asarray(lora) != before).any()
    assert (np.asarray(gigdiff.generate("red coat", model=generator, **settings)) == before).all()


def test_what_cannot_be_recorded_is_called_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Asks(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.sum().item() > 0 else 3)  # a number from the GPU

    layer = Asks(4, 4).cuda().eval()
    graphed, x = GraphedNetwork(layer, torch.float32), torch.ones(2, 4)
    graphed.refresh()
    with torch.no_grad():
        for value in (x, -x):
            assert relative(graphed(value), layer(value.cuda())) < 1e-6
    assert sum("without a CUDA graph" in record.message for record in caplog.records) == 1


def test_cuda_is_what_is_taken_where_nothing_is_asked_for(tiny_model: Path) -> None:
    assert gigdiff.load(str(tiny_model)).device.type == "cuda"


def test_the_upscaler_gives_the_cpus_pixels() -> None:
    torch.manual_seed(0)
    model, x = ProductUpscaler(channels=16, blocks=2, scale=4), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert relative(copy.deepcopy(model).cuda()(x.cuda()), model(x)) < 1e-2
