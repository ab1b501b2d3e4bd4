"""kohya's files: names of every module of the real classes, identical round trips, fused matrices, stock diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gigdiff import kohya, lora
from gigdiff.errors import InputError, ModelMismatchError
from gigdiff.generators.diffusion import PipelineGenerator
from gigdiff.generators.request import GenerationRequest


def fill(names: dict[str, tuple[int, int]], rank: int = 4, alpha: float = 2.0, dtype: Any = torch.float16) -> dict:
    """A kohya file's tensors: name -> (in, out) of each layer."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, (i, o) in names.items():
        out[f"{name}.lora_down.weight"] = torch.randn(rank, i, generator=generator).to(dtype)
        out[f"{name}.lora_up.weight"] = torch.randn(o, rank, generator=generator).to(dtype)
        out[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return out


FILES = {
    "sd": {
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0": (8, 8),
        "lora_unet_mid_block_attentions_0_proj_in": (8, 8),
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": (8, 64),
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj": (8, 8),
        "lora_te_text_model_encoder_layers_3_mlp_fc1": (8, 32),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (8, 8),
        "lora_unet_input_blocks_4_0_in_layers_2": (8, 8),
        "lora_unet_input_blocks_3_0_op": (8, 8),
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v": (8, 8),
        "lora_unet_middle_block_2_out_layers_3": (8, 8),
        "lora_unet_output_blocks_2_2_conv": (8, 8),
        "lora_unet_output_blocks_5_1_proj_out": (8, 8),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (8, 8),
        "lora_te2_text_model_encoder_layers_0_mlp_fc2": (8, 8),
    },
    "flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": (8, 24),
        "lora_unet_double_blocks_0_txt_attn_proj": (8, 8),
        "lora_unet_double_blocks_11_img_mlp_2": (32, 8),
        "lora_unet_single_blocks_3_linear1": (8, 56),
        "lora_unet_single_blocks_3_linear2": (40, 8),
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj": (8, 8),
    },
    "sd3": {
        "lora_unet_joint_blocks_7_x_block_attn_qkv": (8, 24),
        "lora_unet_joint_blocks_7_context_block_attn_proj": (8, 8),
        "lora_unet_joint_blocks_0_x_block_mlp_fc1": (8, 32),
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1": (8, 48),
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": (8, 16),
    },
}


@pytest.mark.parametrize("family", FILES)
def test_kohya_to_diffusers_to_kohya_is_identical(family: str, tmp_path: Path) -> None:
    """Keys, values, dtypes and header; through files, as `gigdiff lora convert` does."""
    tensors = fill(FILES[family])
    header = {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_tag": "kept"}
    first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
    save_file(tensors, first, metadata=header)
    lora.convert(first, second, "diffusers")
    assert all(".lora_A." in key or ".lora_B." in key for key in load_file(second))
    lora.convert(second, third, "kohya")
    back = load_file(third)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in back)
    with safe_open(third, "pt") as file:
        assert dict(file.metadata()) == header
    with pytest.raises(InputError, match="diffusers already"):
        lora.convert(second, third, "diffusers")


def test_every_layer_of_a_fused_block_has_a_name_in_theirs(tiny_sd3: Path, tiny_flux: Path) -> None:
    """Else it keeps diffusers' name, at which kohya's loader shrugs: SD3's modulation did."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    sd3 = SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer")
    flux = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer")
    for naming, model in (("sd3", sd3), ("flux", flux)):
        layers = {
            name: kohya._Layer(torch.zeros(1, m.in_features), torch.zeros(m.out_features, 1), None, 1.0)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and "transformer_blocks" in name
        }
        theirs = kohya._to_theirs(layers, naming)
        assert theirs and not [name for name in theirs if "transformer_blocks" in name]


def test_shift_and_scale_of_sd3s_last_block_change_places() -> None:
    """As diffusers' own loader of Stability's files does (swap_scale_shift); in other blocks they don't."""
    up = torch.arange(16.0).reshape(16, 1)
    for rows, expected in ((16, up.roll(8, 0)), (48, torch.cat([up, up, up]))):
        name = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"
        file = {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": up.repeat(rows // 16, 1)}
        read = kohya.from_kohya(file).tensors
        assert torch.equal(read["transformer.transformer_blocks.23.norm1_context.linear.lora_B.weight"], expected)


def modules_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]


def test_every_module_name_of_the_real_classes_survives_the_underscores(
    tiny_pipeline: Path, tiny_sdxl: Path, tiny_sd3: Path, tiny_flux: Path
) -> None:
    from diffusers import DiffusionPipeline

    seen = 0
    for folder in (tiny_pipeline, tiny_sdxl, tiny_sd3, tiny_flux):
        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        for part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            model = getattr(pipeline, part, None)
            if model is None or "T5" in type(model).__name__:
                continue
            for name in modules_of(model):
                assert kohya._split_words(name.replace(".", "_")) == name
                seen += 1
    assert seen > 150


def test_sdxl_names_cover_every_attention_and_residual_layer(tiny_sdxl: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    names = [n for n in modules_of(unet) if n.startswith(("down_blocks", "mid_block", "up_blocks"))]
    theirs = [kohya._to_ldm(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [kohya._from_ldm(name) for name in theirs] == names


def delta(tensors: dict, alphas: dict, key: str) -> torch.Tensor:
    down, up = tensors[f"{key}.lora_A.weight"].float(), tensors[f"{key}.lora_B.weight"].float()
    return alphas[key] / down.shape[0] * up @ down


@pytest.mark.parametrize("missing", [None, "proj_mlp"])
def test_modules_trained_apart_are_fused_without_changing_what_they_do(missing: str | None) -> None:
    """q, k, v and the MLP of FLUX's single block are one matrix in kohya's names."""
    generator = torch.Generator().manual_seed(0)
    widths = {"attn.to_q": 8, "attn.to_k": 8, "attn.to_v": 8, "proj_mlp": 32}
    widths.pop(missing or "", None)
    tensors, alphas = {}, {}
    for module, width in widths.items():
        key = f"transformer.single_transformer_blocks.0.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 8, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(width, 4, generator=generator)
        alphas[key] = 3.0
    theirs = kohya.to_kohya(tensors, alphas, "flux", "lora_te1_")
    (name,) = {key.split(".")[0] for key in theirs}
    assert name == "lora_unet_single_blocks_0_linear1" and theirs[f"{name}.lora_up.weight"].shape[0] == 56
    back = kohya.from_kohya(theirs)
    for key in alphas:
        assert torch.allclose(delta(back.tensors, back.alphas, key), delta(tensors, alphas, key), atol=1e-5)
    if missing:
        assert delta(back.tensors, back.alphas, f"transformer.single_transformer_blocks.0.{missing}").abs().max() == 0


def test_a_kohya_file_draws_as_its_diffusers_twin_and_as_stock_diffusers_reads_it(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    generator = PipelineGenerator.from_pretrained(tiny_pipeline)
    unet = generator.pipeline.unet
    parameters = lora.add_adapter(unet, lora.LoraSettings(rank=4, lora_alpha=1.0), "made")
    with torch.no_grad():
        for p in parameters.values():
            p.normal_(std=1.0)
    header = lora.lora_header(lora.adapter_configs({"unet": unet}, "made"), {})
    ours = lora.save_lora(tmp_path / "ours.safetensors", lora.lora_tensors({"unet": unet}, "made"), header)
    theirs = lora.convert(ours, tmp_path / "kohya.safetensors", "kohya")
    assert float(load_file(theirs)["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"]) == 1.0

    def draw(generator: PipelineGenerator, file: Path | None) -> np.ndarray:
        request = GenerationRequest(("red bag",), (0,), num_inference_steps=2, lora=None if file is None else str(file))
        return generator.generate(request).images.astype(int)

    generator = PipelineGenerator.from_pretrained(tiny_pipeline)
    plain, one, two = (draw(generator, file) for file in (None, ours, theirs))
    assert np.abs(one - plain).mean() > 0.3 and np.array_equal(one, two)
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(theirs))
    assert np.abs(draw(PipelineGenerator(stock, name="stock"), None) - one).max() <= 1


def test_what_can_not_be_converted_is_named() -> None:
    with pytest.raises(ModelMismatchError, match=r"hada_w1_a.*LoHa"):
        kohya.from_kohya({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(1)})
    with pytest.raises(ModelMismatchError, match="lacks lora_down or lora_up"):
        kohya.from_kohya({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(1, 1)})
    with pytest.raises(ModelMismatchError, match="no known part"):
        kohya.from_kohya(
            {"lora_other_x.lora_up.weight": torch.zeros(1, 1), "lora_other_x.lora_down.weight": torch.zeros(1, 1)}
        )
    with pytest.raises(ModelMismatchError, match=r"time_embedding.linear_1.*no name in SDXL"):
        kohya._to_ldm("time_embedding.linear_1")
