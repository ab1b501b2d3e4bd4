"""LoRA names and tensors between diffusers and kohya's sd-scripts, both ways, without the base model.

    diffusers   unet.down_blocks.0.attentions.0.proj_in.lora_A.weight   alpha in the file's header
    kohya       lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, ....lora_up.weight, ....alpha

kohya joins a module's path with "_", which also occurs inside names; `_COMPOUND` lists the names that contain one, and
the tests hold it against every module of the real classes. What a trunk is called differs by family ("naming"):

    diffusers   SD 1.5: diffusers' own names
    ldm         SDXL: CompVis's names, input_blocks_4_1_... (two residual blocks a level, as SDXL has)
    flux, sd3   Black Forest Labs' and Stability's names, in which q, k and v (and an MLP's input) are one matrix

A fused matrix becomes several diffusers modules that share lora_A; going back, modules that share it are joined again,
so kohya -> diffusers -> kohya is the identity. Modules trained apart are joined as a block-diagonal of thrice the rank,
which computes the same. Only plain LoRA (linear and convolution) and DoRA are known here, not LoHa, LoKr or Tucker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gigdiff.errors import ModelMismatchError

__all__ = ["NAMINGS", "Kohya", "from_kohya", "is_kohya", "to_kohya"]

NAMINGS = ("diffusers", "ldm", "flux", "sd3")

# Names with an underscore inside.
_WORDS = """
text_model self_attn q_proj k_proj v_proj out_proj text_projection token_embedding position_embedding down_blocks
up_blocks mid_block transformer_blocks single_transformer_blocks to_q to_k to_v to_out proj_in proj_out proj_mlp
time_emb_proj conv_in conv_out conv_shortcut conv1 conv2 linear_1 linear_2 time_embedding add_embedding
encoder_hid_proj add_q_proj add_k_proj add_v_proj to_add_out ff_context norm1_context norm_out norm_q norm_k
norm_added_q norm_added_k time_text_embed timestep_embedder text_embedder guidance_embedder context_embedder
x_embedder pos_embed final_layer_norm layer_norm1 layer_norm2
"""
_COMPOUND = sorted(_WORDS.split(), key=len, reverse=True)  # the longest that fits is meant

# SDXL: inside a block, CompVis's names of a residual block's layers.
_LDM_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LAYERS = 3  # SDXL's levels: two residual blocks and a resampling (down), three residual blocks (up)

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# naming -> (their block, diffusers' block, their layer -> diffusers' modules; several where theirs is fused)
_FUSED: dict[str, list[tuple[str, str, dict[str, tuple[str, ...]]]]] = {
    "flux": [
        (
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn_qkv": _QKV,
                "img_attn_proj": ("attn.to_out.0",),
                "img_mlp_0": ("ff.net.0.proj",),
                "img_mlp_2": ("ff.net.2",),
                "img_mod_lin": ("norm1.linear",),
                "txt_attn_qkv": _ADDED,
                "txt_attn_proj": ("attn.to_add_out",),
                "txt_mlp_0": ("ff_context.net.0.proj",),
                "txt_mlp_2": ("ff_context.net.2",),
                "txt_mod_lin": ("norm1_context.linear",),
            },
        ),
        (
            "single_blocks",
            "single_transformer_blocks",
            {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)},
        ),
    ],
    "sd3": [
        (
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block_attn_qkv": _QKV,
                "x_block_attn_proj": ("attn.to_out.0",),
                "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block_attn2_proj": ("attn2.to_out.0",),
                "x_block_mlp_fc1": ("ff.net.0.proj",),
                "x_block_mlp_fc2": ("ff.net.2",),
                "x_block_adaLN_modulation_1": ("norm1.linear",),
                "context_block_attn_qkv": _ADDED,
                "context_block_attn_proj": ("attn.to_add_out",),
                "context_block_mlp_fc1": ("ff_context.net.0.proj",),
                "context_block_mlp_fc2": ("ff_context.net.2",),
                "context_block_adaLN_modulation_1": ("norm1_context.linear",),
            },
        ),
    ],
}


class Kohya(NamedTuple):
    """A kohya file read as diffusers names things.

    Attributes:
        tensors: "<part>.<module>.lora_A.weight" and so on.
        alphas: "<part>.<module>" -> alpha.
        naming: which of NAMINGS the trunk used.
        text: "lora_te_" or "lora_te1_", how it called the first text encoder.
        alpha_dtype: of the alpha scalars, so that they can be written back as they were.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    naming: str
    text: str
    alpha_dtype: torch.dtype


class _Layer(NamedTuple):
    """One LoRA layer: down (r, in[, k, k]), up (out, r[, 1, 1]), DoRA's magnitude (out,) or None, alpha."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    alpha: float


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file's keys are kohya's."""
    return any(key.startswith(("lora_unet_", "lora_te")) for key in keys)


def from_kohya(tensors: Mapping[str, Tensor]) -> Kohya:
    """Read a kohya file's tensors.

    Raises:
        ModelMismatchError: a key that is none of plain LoRA's or DoRA's, or a module of no known name.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        if kind not in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"):
            raise ModelMismatchError(
                f'"{key}" is not plain LoRA or DoRA; LoHa, LoKr, LoCon with a middle matrix and the like can\'t be '
                "converted."
            )
        grouped.setdefault(name, {})[kind] = tensor
    trunk = [name.removeprefix("lora_unet_") for name in grouped if name.startswith("lora_unet_")]
    naming = _naming_of(trunk)
    part = "transformer" if naming in _FUSED else "unet"
    text = "lora_te1_" if any(name.startswith(("lora_te1_", "lora_te2_", "lora_te3_")) for name in grouped) else ""
    text = text or "lora_te_"
    prefixes = {"lora_unet_": part, text: "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"}
    out: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    dtypes = {one["alpha"].dtype for one in grouped.values() if "alpha" in one}
    for name, kinds in grouped.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            raise ModelMismatchError(f'"{name}" is of no known part; known: {", ".join(prefixes)}.')
        if not {"lora_down.weight", "lora_up.weight"} <= set(kinds):
            raise ModelMismatchError(f'"{name}" lacks lora_down or lora_up: the file is not whole.')
        down, up = kinds["lora_down.weight"], kinds["lora_up.weight"]
        alpha = float(kinds["alpha"]) if "alpha" in kinds else float(down.shape[0])
        layer = _Layer(down, up, _magnitude(name, kinds.get("dora_scale"), up.shape[0]), alpha)
        rest = name.removeprefix(prefix)
        naming_here = naming if prefix == "lora_unet_" else "diffusers"
        for module, one in _to_diffusers(rest, layer, naming_here).items():
            key = f"{prefixes[prefix]}.{module}"
            out[f"{key}.lora_A.weight"], out[f"{key}.lora_B.weight"] = one.down, one.up
            if one.magnitude is not None:
                out[f"{key}.lora_magnitude_vector"] = one.magnitude
            alphas[key] = one.alpha
    return Kohya(out, alphas, naming, text, dtypes.pop() if len(dtypes) == 1 else torch.float32)


def to_kohya(
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    naming: str,
    text: str = "lora_te_",
    alpha_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The inverse of `from_kohya`: diffusers' tensors and alphas as a kohya file's tensors.

    Raises:
        ModelMismatchError: a module that this naming has no name for.
    """
    prefixes = {
        "unet": "lora_unet_",
        "transformer": "lora_unet_",
        "text_encoder": text,
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }
    by_part: dict[str, dict[str, _Layer]] = {}
    for key, alpha in alphas.items():
        part, module = key.split(".", 1)
        by_part.setdefault(part, {})[module] = _Layer(
            tensors[f"{key}.lora_A.weight"],
            tensors[f"{key}.lora_B.weight"],
            tensors.get(f"{key}.lora_magnitude_vector"),
            alpha,
        )
    out: dict[str, Tensor] = {}
    for part, layers in by_part.items():
        if part not in prefixes:
            raise ModelMismatchError(f'part "{part}" has no name in a kohya file; known: {", ".join(prefixes)}.')
        trunk = part in ("unet", "transformer")
        for name, layer in _to_theirs(layers, naming if trunk else "diffusers").items():
            key = prefixes[part] + name
            out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = layer.down, layer.up
            out[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=alpha_dtype)
            if layer.magnitude is not None:
                out[f"{key}.dora_scale"] = layer.magnitude.unsqueeze(1)
    return out


def _magnitude(name: str, scale: Tensor | None, out_features: int) -> Tensor | None:
    """kohya's dora_scale (out, 1) as peft's magnitude (out,)."""
    if scale is None:
        return None
    if scale.numel() != out_features or scale.shape[0] != out_features:
        raise ModelMismatchError(
            f'"{name}" has a dora_scale of shape {tuple(scale.shape)}: magnitudes over the inputs have no counterpart '
            "in peft, which keeps one an output."
        )
    return scale.reshape(-1)


def _naming_of(trunk: list[str]) -> str:
    starts = {
        "ldm": ("input_blocks_", "middle_block_", "output_blocks_"),
        "flux": ("double_blocks_", "single_blocks_"),
        "sd3": ("joint_blocks_",),
    }
    for naming, prefixes in starts.items():
        if any(name.startswith(prefixes) for name in trunk):
            return naming
    return "diffusers"


def _to_diffusers(name: str, layer: _Layer, naming: str) -> dict[str, _Layer]:
    """Their name (prefix taken off) -> diffusers' modules; several where theirs is a fused matrix."""
    if naming == "ldm":
        return {_from_ldm(name): layer}
    for theirs, ours, layers in _FUSED.get(naming, []):
        match = re.fullmatch(rf"{theirs}_(\d+)_(.+)", name)
        if match and match[2] in layers:
            modules = [f"{ours}.{match[1]}.{module}" for module in layers[match[2]]]
            return dict(zip(modules, _split(_modulating(match[2], layer), len(modules)), strict=True))
    return {_split_words(name): layer}


def _to_theirs(layers: Mapping[str, _Layer], naming: str) -> dict[str, _Layer]:
    """diffusers' modules of one part -> their names, prefix left out."""
    left = dict(layers)
    out: dict[str, _Layer] = {}
    for theirs, ours, table in _FUSED.get(naming, []):
        blocks = sorted({m[1] for m in (re.match(rf"{ours}\.(\d+)\.", module) for module in left) if m}, key=int)
        for block in blocks:
            for their_layer, modules in table.items():
                names = [f"{ours}.{block}.{module}" for module in modules]
                have = [left.pop(name, None) for name in names]
                found = [one for one in have if one is not None]
                if found:
                    whole = [one or _nothing(module, found[0]) for one, module in zip(have, modules, strict=True)]
                    out[f"{theirs}_{block}_{their_layer}"] = _modulating(their_layer, _join(whole))
    for module, layer in left.items():
        out[_to_ldm(module) if naming == "ldm" else module.replace(".", "_")] = layer
    return out


def _modulating(their_layer: str, layer: _Layer) -> _Layer:
    """SD3's last block modulates its text by shift and scale alone, which diffusers has the other way round."""
    if their_layer != "context_block_adaLN_modulation_1" or layer.up.shape[0] != 2 * layer.down.shape[1]:
        return layer
    half = layer.down.shape[1]
    magnitude = None if layer.magnitude is None else layer.magnitude.roll(half)
    return _Layer(layer.down, layer.up.roll(half, 0), magnitude, layer.alpha)


def _nothing(module: str, beside: _Layer) -> _Layer:
    """A layer of rank 0 for the part of a fused matrix that has no LoRA; the MLP's part is four times the width."""
    width = beside.down.shape[1] * (4 if module == "proj_mlp" else 1)
    return _Layer(beside.down[:0], beside.up.new_zeros(width, 0), None, 0.0)


def _split(layer: _Layer, parts: int) -> list[_Layer]:
    """A fused layer as `parts` layers: the same lora_A, lora_B cut by rows. The first three are as wide as the input
    (q, k, v), what is left is the MLP's."""
    if parts == 1:
        return [layer]
    width = layer.down.shape[1] if parts == 4 else layer.up.shape[0] // parts
    sizes = [width] * 3 + ([layer.up.shape[0] - 3 * width] if parts == 4 else [])
    ups = layer.up.split(sizes)
    magnitudes = [None] * parts if layer.magnitude is None else layer.magnitude.split(sizes)
    return [
        # A copy each: safetensors refuses tensors that share memory.
        _Layer(layer.down.clone(), up.clone(), magnitude, layer.alpha)
        for up, magnitude in zip(ups, magnitudes, strict=True)
    ]


def _join(layers: list[_Layer]) -> _Layer:
    """The inverse of `_split`; layers trained apart become a block-diagonal layer, with alpha raised as the rank is."""
    first = layers[0]
    if len(layers) == 1:
        return first
    magnitudes = [layer.magnitude for layer in layers if layer.magnitude is not None]
    magnitude = torch.cat(magnitudes) if len(magnitudes) == len(layers) else None
    if all(layer.alpha == first.alpha and torch.equal(layer.down, first.down) for layer in layers):
        return _Layer(first.down, torch.cat([layer.up for layer in layers]), magnitude, first.alpha)
    ranks = [max(1, layer.down.shape[0]) for layer in layers]
    # One alpha serves the whole matrix, so each block's own scale alpha / rank goes into its lora_B.
    total = sum(layer.down.shape[0] for layer in layers)
    ups = [layer.up * (layer.alpha / rank) for layer, rank in zip(layers, ranks, strict=True)]
    return _Layer(torch.cat([layer.down for layer in layers]), torch.block_diag(*ups), magnitude, float(total))


def _split_words(name: str) -> str:
    """ "down_blocks_0_attentions_1_proj_in" -> "down_blocks.0.attentions.1.proj_in".

    Raises:
        ModelMismatchError: empty.
    """
    words: list[str] = []
    rest = name
    while rest:
        word = next((c for c in _COMPOUND if rest == c or rest.startswith(c + "_")), rest.split("_", 1)[0])
        words.append(word)
        rest = rest[len(word) + 1 :]
    if not words:
        raise ModelMismatchError(f'"{name}" names no module.')
    return ".".join(words)


def _from_ldm(name: str) -> str:
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d+)_(.+)", name)
    if match:
        index, inner, rest = int(match[2]), int(match[3]), match[4]
        block, layer = divmod(index - 1 if match[1] == "input" else index, _LAYERS)
        side = "down_blocks" if match[1] == "input" else "up_blocks"
        if rest == "op":
            return f"{side}.{block}.downsamplers.0.conv"
        if rest == "conv":
            return f"{side}.{block}.upsamplers.0.conv"
        if rest in _LDM_RESNET:
            return f"{side}.{block}.resnets.{layer}.{_LDM_RESNET[rest]}"
        if inner == 1:
            return f"{side}.{block}.attentions.{layer}.{_split_words(rest)}"
    match = re.fullmatch(r"middle_block_(\d+)_(.+)", name)
    if match:
        inner, rest = int(match[1]), match[2]
        if rest in _LDM_RESNET:
            return f"mid_block.resnets.{inner // 2}.{_LDM_RESNET[rest]}"
        return f"mid_block.attentions.0.{_split_words(rest)}"
    raise ModelMismatchError(f'"{name}" is no module of SDXL\'s UNet that is known here.')


def _to_ldm(module: str) -> str:
    back = {ours: theirs for theirs, ours in _LDM_RESNET.items()}
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if match:
        index = int(match[2]) * _LAYERS + int(match[4])
        side = f"input_blocks_{index + 1}" if match[1] == "down" else f"output_blocks_{index}"
        if match[3] == "attentions":
            return f"{side}_1_{match[5].replace('.', '_')}"
        if match[5] in back:
            return f"{side}_0_{back[match[5]]}"
    match = re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module)
    if match:
        return f"input_blocks_{int(match[1]) * _LAYERS + _LAYERS}_0_op"
    match = re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module)
    if match:  # after the attention where the level has one (SDXL: the first two), else after the residual block
        return f"output_blocks_{int(match[1]) * _LAYERS + _LAYERS - 1}_2_conv"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if match and match[1] == "attentions":
        return f"middle_block_1_{match[3].replace('.', '_')}"
    if match and match[3] in back:
        return f"middle_block_{2 * int(match[2])}_{back[match[3]]}"
    raise ModelMismatchError(f'module "{module}" has no name in SDXL\'s kohya files; convert without it.')
