"""Attention backends: a float64 reference's numbers from each, the choice, and clear words where one can't be had."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from gigdiff import attention
from gigdiff.attention import BACKENDS, OneKernel, Workload, available_backends, choose, measure, set_attention
from gigdiff.errors import InputError, MissingDependencyError

CPU = torch.device("cpu")
# What runs here, and SDPA held to one kernel, with the two kernels that a CPU has.
HERE = ("sdpa", "math", "blockwise", "sliced")
PROCESSORS = {name: lambda name=name: attention._processor(name) for name in HERE} | {
    "one kernel": lambda: OneKernel("FLASH_ATTENTION", attention._processor("sdpa")),
    "the other kernel": lambda: OneKernel("MATH", attention._processor("sdpa")),
}
# batch, queries, keys (None: self-attention), heads, head size
SHAPES = [(1, 5, None, 1, 8), (2, 20, None, 4, 12), (3, 80, 33, 4, 16), (2, 7, 3, 2, 40)]


def reference(layer: Attention, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, written out, with the layer's own projections."""
    source = x if text is None else text
    batch, heads = x.shape[0], layer.heads

    def split(y: Tensor) -> Tensor:
        return y.reshape(batch, y.shape[1], heads, -1).permute(0, 2, 1, 3)

    q, k, v = split(layer.to_q(x)), split(layer.to_k(source)), split(layer.to_v(source))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask[:, None]  # (batch, 1, 1, keys): the same for all heads and queries
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return layer.to_out[0](torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))


def gradients(layer: Attention, output: Tensor, weight: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((output * weight).sum(), [*layer.parameters(), *inputs]))


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_outputs_and_gradients_are_those_of_reference_attention(name: str, shape: tuple, masked: bool) -> None:
    batch, queries, keys, heads, size = shape
    torch.manual_seed(0)
    layer = Attention(
        query_dim=heads * size, cross_attention_dim=None if keys is None else 24, heads=heads, dim_head=size
    )
    with torch.no_grad():  # sharper than at initialisation, so that attention is far from an average
        layer.to_q.weight *= 4
        layer.to_k.weight *= 4
    layer.set_processor(PROCESSORS[name]())
    x = torch.randn(batch, queries, heads * size, requires_grad=True)
    text = None if keys is None else torch.randn(batch, keys, 24, requires_grad=True)
    mask = None
    if masked:
        mask = torch.zeros(batch, 1, keys or queries)
        mask[0, :, 1:] = -30.0  # the first row sees its first key, the others all but their last
        mask[1:, :, -1] = -2.0
    exact = copy.deepcopy(layer).double()
    x64, text64 = x.detach().double().requires_grad_(), None
    if text is not None:
        text64 = text.detach().double().requires_grad_()
    weight = torch.randn(batch, queries, heads * size)

    output = layer(x, encoder_hidden_states=text, attention_mask=mask)
    expected = reference(exact, x64, text64, None if mask is None else mask.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=2e-5)
    ours = gradients(layer, output, weight, [x] if text is None else [x, text])
    theirs = gradients(exact, expected, weight.double(), [x64] if text64 is None else [x64, text64])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=2e-3 * float(other.abs().max() + 1e-3))


def test_the_reference_notices_queries_and_keys_swapped() -> None:
    torch.manual_seed(0)
    layer, x = Attention(query_dim=32, heads=2, dim_head=16), torch.randn(2, 20, 32)
    expected = reference(layer, x, None, None)
    layer.to_q, layer.to_k = layer.to_k, layer.to_q
    assert (layer(x) - expected).abs().max() > 1e-2


def test_one_kernel_is_copied_with_its_model_and_explains_what_it_cannot_do() -> None:
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    layer.set_processor(OneKernel("CUDNN_ATTENTION", attention._processor("sdpa")))  # a CPU has no such kernel
    with pytest.raises(InputError, match=r'CUDNN_ATTENTION kernel.*attention="sdpa"'):
        copy.deepcopy(layer)(torch.randn(1, 4, 16))


def tiny_unet(**more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16,), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**(settings | more))


def test_every_usable_backend_gives_a_unet_the_same_output_and_gradients() -> None:
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
    assert {"math", "sdpa", "sliced"} <= set(results)
    for output, gradient in results.values():
        torch.testing.assert_close(output, results["math"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, results["math"][1], rtol=1e-3, atol=1e-5)


def test_unets_with_projections_of_their_own_for_the_text_keep_their_kind() -> None:
    unet = tiny_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D",), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    x, text, outputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), []
    for name in HERE:
        set_attention(unet, name)
        outputs.append(unet(x, 10, text).sample)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)


# The choice


def work(tokens: int, training: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Workload:
    return Workload(torch.device(device), dtype, tokens, 2, 8, training)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIGDIFF_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept" / "attention.json"


def test_auto_takes_the_table_where_there_is_one(cache: Path) -> None:
    for tokens in (20, 80, 500, 100_000):
        assert choose(work(tokens, training=False))[0] == "sdpa"  # pixels must not hang on a stopwatch
    assert choose(work(80, training=True))[0] == "math"
    assert choose(work(4096, training=True))[0] == "sdpa"
    assert choose(work(80, training=True, dtype=torch.bfloat16))[0] == "math"
    assert choose(work(500, training=True, dtype=torch.bfloat16))[0] == "blockwise"
    assert choose(work(80, training=True, device="mps"))[0] == "sdpa"
    assert not cache.exists()


def test_auto_reads_the_work_off_the_model_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gigdiff.attention"):
        assert set_attention(tiny_unet(), "auto") == "sdpa"
        assert set_attention(tiny_unet(), "auto", training=True) == "math"
    assert "UNet2DConditionModel on cpu: sdpa (table: fixed for inference" in caplog.messages[0]
    assert "math (table" in caplog.messages[1]
    deep = tiny_unet(
        sample_size=(16, 8), block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
    )  # fmt: skip
    found = attention._workload(deep, CPU, torch.bfloat16, True, None)
    assert found == Workload(CPU, torch.bfloat16, 32, 4, 8, True)  # 8 x 4 after one halving, 32 channels in 4 heads
    assert attention._workload(deep, CPU, torch.bfloat16, True, (64, 64)).tokens == 1024  # latents of another size
    assert set_attention(deep, "auto", training=True, dtype=torch.bfloat16, size=(64, 64)) == "blockwise"


def test_what_was_measured_is_kept_and_not_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"sdpa": 2.0, "math": 1.0}])
    monkeypatch.setattr(attention, "measure", lambda *_: next(answers))
    assert choose(work(500, training=True)) == ("math", "measured: sdpa 2000.00 ms, math 1000.00 ms")
    chosen, reason = choose(work(400, training=True))  # 512 and 400 tokens are one bucket
    assert chosen == "math" and str(cache) in reason
    [(key, entry)] = json.loads(cache.read_text()).items()
    assert entry == {"backend": "math", "seconds": {"sdpa": 2.0, "math": 1.0}}
    for part in (torch.__version__, "float32", "512 tokens, 2 x 8", "training"):
        assert part in key
    assert list(cache.parent.iterdir()) == [cache], "no temporary file is left"


def test_sdpa_stays_unless_another_is_clearly_faster(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "measure", lambda *_: {"sdpa": 1.05, "math": 1.0})
    assert choose(work(500, training=True))[0] == "sdpa"


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"a": 1}', "\0"])
def test_a_torn_cache_is_measured_anew_and_mended(cache: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "measure", lambda *_: {"sdpa": 2.0, "math": 1.0})
    cache.parent.mkdir()
    cache.write_text(content)
    assert choose(work(500, training=True))[0] == "math"
    assert choose(work(500, training=True))[1].startswith("measured before")


def test_an_entry_that_makes_no_sense_is_measured_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "measure", lambda *_: {"sdpa": 2.0, "math": 1.0})
    choose(work(500, training=True))
    [key] = json.loads(cache.read_text())
    for entry in ("math", {"backend": "rm -rf"}, {"backend": ["math"]}, None):
        cache.write_text(json.dumps({key: entry}))
        assert choose(work(500, training=True))[1].startswith("measured: ")


def test_without_a_cache_the_choice_is_sdpa_so_that_the_next_run_chooses_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIGDIFF_CACHE_DIR", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(attention, "measure", lambda *_: {"sdpa": 2.0, "math": 1.0})
    chosen, reason = choose(work(500, training=True))
    assert chosen == "sdpa" and "can't be written" in reason


def test_a_process_that_measured_at_the_same_time_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(work: Workload, candidates: list[str]) -> dict[str, float]:
        cache.parent.mkdir()
        cache.write_text(json.dumps({attention._key(work, candidates): {"backend": "sdpa"}}))
        return {"sdpa": 2.0, "math": 1.0}

    monkeypatch.setattr(attention, "measure", slow)
    assert choose(work(500, training=True))[0] == "sdpa"


def test_measuring_times_each_candidate_and_leaves_random_states_alone() -> None:
    before = torch.get_rng_state()
    seconds = measure(work(16, training=True), ["sdpa", "math", "sdpa_cudnn"], repeats=1)
    assert set(seconds) == {"sdpa", "math"} and all(0 < value < 60 for value in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_lies_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GIGDIFF_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert attention.cache_file() == tmp_path / "gigdiff" / "attention.json"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert attention.cache_file() == tmp_path / "local" / "gigdiff" / "attention.json"


# What can't be had


def test_unknown_and_unusable_backends_are_explained() -> None:
    with pytest.raises(InputError, match='did you mean "xformers"'):
        set_attention(tiny_unet(), "xformer")
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(MissingDependencyError, match=r"pip install 'gigdiff\[cuda\]'"):
            set_attention(tiny_unet(), "xformers")
    assert set(available_backends()) | {"auto"} == set(BACKENDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", attention.KERNELS)
def test_cuda_kernels_without_cuda(backend: str) -> None:
    with pytest.raises(MissingDependencyError, match=rf"{backend}.*torch {torch.__version__.split('+')[0]}.*CUDA"):
        set_attention(tiny_unet(), backend)


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has all backends; what torch would say of a shape can't be asked here."""
    monkeypatch.setattr(attention, "available_backends", lambda: dict.fromkeys(BACKENDS, (True, "")))
    monkeypatch.setattr(attention, "_refusal", lambda *_: "")


def test_cuda_kernels_for_a_model_that_they_do_not_fit(as_if_cuda: None) -> None:
    with pytest.raises(InputError, match=r'"sdpa_flash" runs on CUDA only, and this model is on cpu'):
        set_attention(tiny_unet(), "sdpa_flash")
    with pytest.raises(InputError, match=r"float16 and bfloat16, and the model in float32"):
        set_attention(tiny_unet(), "sdpa_flash", device="cuda")
    with pytest.raises(InputError, match=r"float16 and bfloat16, and the model in float32"):
        set_attention(tiny_unet(), "sdpa_cudnn", device="cuda")
    wide = tiny_unet(block_out_channels=(264,), attention_head_dim=1, norm_num_groups=8)
    with pytest.raises(InputError, match=r"up to 256 numbers, and the model has heads of 264"):
        set_attention(wide, "sdpa_flash", device="cuda", dtype=torch.bfloat16)
    unet = tiny_unet()
    assert set_attention(unet, "sdpa_efficient", device="cuda") == "sdpa_efficient"
    kinds = {(processor.kernel, type(processor.processor).__name__) for processor in unet.attn_processors.values()}
    assert kinds == {("EFFICIENT_ATTENTION", "AttnProcessor2_0")}


def test_auto_on_cuda_measures_what_could_run(as_if_cuda: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(work: Workload, candidates: list[str]) -> dict[str, float]:
        asked.append(candidates)
        return {"sdpa": 2.0, candidates[-1]: 1.0}

    monkeypatch.setattr(attention, "measure", timed)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    half = Workload(torch.device("cuda"), torch.bfloat16, 4096, 8, 40, False)
    assert choose(half)[0] == "xformers"
    assert choose(work(4096, training=False, device="cuda"))[0] == "xformers"
    assert asked == [["sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "xformers"],
                     ["sdpa", "sdpa_efficient", "xformers"]]  # fmt: skip
    assert all(key.startswith("NVIDIA Test | torch") for key in json.loads(cache.read_text()))


def test_models_are_given_xformers_processors_and_lose_them_again(as_if_cuda: None) -> None:
    for model, kind in ((tiny_unet(), "XFormersAttnProcessor"), (tiny_sd3_transformer(), "XFormersJointAttnProcessor")):
        before = {name: type(processor) for name, processor in model.attn_processors.items()}
        assert set_attention(model, "xformers", device="cuda", dtype=torch.float16) == "xformers"
        assert {type(processor).__name__ for processor in model.attn_processors.values()} == {kind}
        set_attention(model, "sdpa")
        assert {name: type(processor) for name, processor in model.attn_processors.items()} == before


def test_what_xformers_says_of_a_model_it_cannot_do_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: xformers built for another CUDA imports and has no kernel; diffusers' own switch tries float32 alone."""

    def attend(q: Tensor, *_: Tensor) -> Tensor:
        if q.dtype == torch.float32:
            raise NotImplementedError("No operator found\n for float32")
        return 2 * q

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, package.ops = attend, ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention.importlib.metadata, "version", lambda name: "0.0.99")
    said = attention._refusal("xformers", CPU, torch.float32, 40, True)
    assert said.startswith("xformers 0.0.99 says of torch.float32, heads of 40: No operator found for float32. One ")
    assert "pip install xformers --index-url https://download.pytorch.org/whl/cu" in said
    assert attention._refusal("xformers", CPU, torch.float16, 40, True) == ""


# Transformers


def tiny_flux_transformer():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


def tiny_sd3_transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=32,
    ).eval()  # fmt: skip


def flux_output(model) -> Tensor:
    torch.manual_seed(1)
    return model(
        torch.randn(1, 12, 16), torch.randn(1, 5, 32), torch.randn(1, 16), torch.tensor([0.5]),
        img_ids=torch.arange(36.0).reshape(12, 3) % 4, txt_ids=torch.zeros(5, 3), guidance=torch.tensor([3.5]),
    ).sample  # fmt: skip


def sd3_output(model) -> Tensor:
    torch.manual_seed(1)
    return model(torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32), torch.randn(1, 32), torch.tensor([500])).sample


@pytest.mark.parametrize(
    ("build", "draw"), [(tiny_flux_transformer, flux_output), (tiny_sd3_transformer, sd3_output)], ids=["flux", "sd3"]
)
def test_transformers_take_what_their_layers_can(build, draw) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    default = _AttentionBackendRegistry.get_active_backend()[0]
    model = build()
    before = {name: type(processor) for name, processor in model.attn_processors.items()}
    with torch.no_grad():
        stock = draw(model)
        for backend in ("auto", "math", "blockwise", "sdpa"):
            assert set_attention(model, backend) == ("sdpa" if backend == "auto" else backend)
            torch.testing.assert_close(draw(model), stock, rtol=1e-4, atol=1e-5)
    assert {name: type(processor) for name, processor in model.attn_processors.items()} == before
    assert _AttentionBackendRegistry.get_active_backend()[0] == default, "other models are left as they were"
    with pytest.raises(InputError, match="is for UNets"):
        set_attention(model, "sliced")


def test_a_transformer_is_held_to_one_kernel(as_if_cuda: None) -> None:
    flux, sd3 = tiny_flux_transformer(), tiny_sd3_transformer()
    set_attention(flux, "sdpa_flash", device="cuda", dtype=torch.bfloat16)
    assert {str(p._attention_backend.value) for p in flux.attn_processors.values()} == {"_native_flash"}
    for backend, kernel in attention.KERNELS.items():  # one after the other: wrapped once, not in each other
        set_attention(sd3, backend, device="cuda", dtype=torch.bfloat16)
        assert {(p.kernel, type(p.processor).__name__) for p in sd3.attn_processors.values()} == {
            (kernel, "JointAttnProcessor2_0")
        }
