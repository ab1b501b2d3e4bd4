"""Convolutions and linear layers that draw faster on a CPU in bfloat16: their weights are converted only once.

Under autocast torch hands a layer's weights to oneDNN as they lie, and oneDNN rearranges them for its kernels each
time, which tells at batch 1. oneDNN's packed form gives the same bits (a test). 1 x 1 convolutions are linear layers.
"""

from __future__ import annotations

import copy
import functools
import platform
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from gigdiff.exactness import per_sample
from gigdiff.precision import cpu_has_amx, cpu_has_bfloat16

__all__ = ["can_pack", "is_rounded", "pack", "state_of", "unpacked"]

# On a CPU with AMX oneDNN splits sums of this many products in ways that depend on the number of rows: one product a
# sample there, so that an image is the same bits in any batch. (Emerald Rapids, oneDNN 3.12: of 512 and more; never of
# 448 and fewer.)
SPLIT_SUMS = 449

# By module and not on it: packed tensors can't be copied, models can.
_PACKED: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor, Tensor | None]] = weakref.WeakKeyDictionary()


def can_pack() -> bool:
    """Whether this CPU's kernels take packed weights: bfloat16 instructions, and x86, where they were tried."""
    return cpu_has_bfloat16() and platform.machine() in ("x86_64", "AMD64")


def pack(model: nn.Module) -> None:
    """Let the model's linear layers and convolutions use packed weights wherever they may, see `_may`.

    What they hold, save and are named stays as it is. A weight that was changed or replaced is packed anew. Nothing
    happens on a CPU without bfloat16 instructions, or other than x86: oneDNN's layouts were tried there only.
    """
    if not can_pack():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _PackedLinear
        elif type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
            module.__class__ = _PackedConv2d


def state_of(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Another list after any change of the weights, to tell by whether a copy of them is still true."""
    _count_fused_steps()
    # In-place changes count the version up; peft's merging puts another tensor behind `data`, which does not.
    return [(p.data_ptr(), p._version) for p in weights]


@functools.cache
def _count_fused_steps() -> None:
    """From now on let fused optimizers count the version of what they change up, as others do (torch 2.13)."""

    def count(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version(group["params"])

    register_optimizer_step_post_hook(count)


def unpacked(model: nn.Module) -> nn.Module:
    """A copy with torch's own layers, which shares the model's weights."""
    weights: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, weights)
    for module in plain.modules():
        if isinstance(module, _PackedLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(module, _PackedConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return plain


class _PackedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _linear(self, input.bfloat16()) if _may(input) else super().forward(input)


class _PackedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if not _may(input) or isinstance(self.padding, str):
            return super().forward(input)
        input = input.bfloat16()
        if _is_linear(self):
            return _linear(self, input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return _convolution(self, input, *_packed(self, input))


def _is_linear(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer is, if only at each place, a linear one. A convolution had better not be one to oneDNN: of its
    layouts for 1 x 1 some fit batches of one and no others, and a weight in the wrong one took 50 times as long."""
    if isinstance(layer, nn.Linear):
        return True
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


def _linear(layer: nn.Linear | nn.Conv2d, input: Tensor) -> Tensor:
    split = _is_split(layer, input)
    weight, bias = _packed(layer, input, split)
    if split:
        return per_sample(input, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def is_rounded(input: Tensor) -> bool:
    """Whether a layer given `input` computes in bfloat16 by autocast, on a CPU."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return autocast and input.device.type == "cpu"


def _may(input: Tensor) -> bool:
    """Drawing: no gradient is wanted."""
    return not torch.is_grad_enabled() and is_rounded(input)


def _is_split(layer: nn.Linear | nn.Conv2d, input: Tensor) -> bool:
    """Of sequences: one row a sample, as the noise level's, was the same bits in up to 64."""
    return layer.weight.shape[1] >= SPLIT_SUMS and input.dim() > 2 and cpu_has_amx()


def _convolution(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with the layer's settings by packed weights."""
    return torch.ops.mkldnn._convolution_pointwise(
        input, weight, bias, layer.padding, layer.stride, layer.dilation, 1, "none", [], ""
    )


# The first input's size goes into a convolution's layout; others were nearly as fast with it, and without any it was
# half as fast.
def _convolution_layout(layer: nn.Conv2d, weight: Tensor, input: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, layer.padding, layer.stride, layer.dilation, 1, input.shape
    )


def _linear_layout(weight: Tensor, rows: int) -> Tensor:
    # That for a single row is slower for many.
    return torch.ops.mkldnn._reorder_linear_weight(weight, max(2, rows))


def _packed(layer: nn.Linear | nn.Conv2d, input: Tensor, split: bool = False) -> tuple[Tensor, Tensor | None]:
    """The weights, for one product a sample if `split`, and the bias."""
    state = (split, state_of(p for p in (layer.weight, layer.bias) if p is not None))
    known = _PACKED.get(layer)
    if known is not None and known[0] == state:
        return known[1], known[2]
    weight = layer.weight.detach().bfloat16()
    if split:
        packed = weight.flatten(1).t().contiguous().t()  # for a batched product, which takes no packed ones
    elif _is_linear(layer):
        packed = _linear_layout(weight.flatten(1), input.numel() // layer.weight.shape[1])
    else:
        assert isinstance(layer, nn.Conv2d)
        packed = _convolution_layout(layer, weight, input)
    bias = None if layer.bias is None else layer.bias.detach().bfloat16()
    _PACKED[layer] = (state, packed, bias)
    return packed, bias
