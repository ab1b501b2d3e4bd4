"""Group norm that is quick in half precision and channels last on a CPU.

There torch's kernel takes a group's channels of one place at a time. Where they fill no vector (fewer than 16, as in
every network of gigdiff and the upper levels of Stable Diffusion's), it takes up to nine times as long as in float32
with the conversions to it and back (torch 2.13; docs/performance.md). Both compute in float32 and round once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["quicken_group_norms"]

VECTOR = 16  # channels a group from which torch's kernel is as fast
PLACES = 1024  # from which its forward pass is another, quick one; its backward pass is not


def quicken_group_norms(model: nn.Module) -> None:
    """Let the model's group norms compute in float32 where that is quicker. What they hold and are named stays."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _GroupNorm


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not _is_slow(input, self.num_groups) or self.weight is None:
            return super().forward(input)
        if torch.is_grad_enabled():
            return _InFloat32.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return _normed(input, self.weight, self.bias, self.num_groups, self.eps)[0]


def _is_slow(input: Tensor, groups: int) -> bool:
    half = input.dtype in (torch.bfloat16, torch.float16)
    return (
        half and input.device.type == "cpu" and input.dim() == 4 and input.shape[1] < VECTOR * groups
        and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    )  # fmt: skip


def _normed(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output like x, and the groups' means and reciprocal deviations in float32."""
    n, c, h, w = x.shape
    wide = x if h * w >= PLACES else x.float()
    weight, bias = weight.float(), bias.float()
    output, mean, scale = torch.native_group_norm(wide, weight, bias, n, c, h * w, groups, eps)
    return output.to(x.dtype), mean.float(), scale.float()


class _InFloat32(torch.autograd.Function):
    """The same with torch's own gradient; a cast that autograd knows of would keep the input in float32 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:  # type: ignore[override]
        output, mean, scale = _normed(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.groups = groups
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, scale = ctx.saved_tensors
        n, c, h, w = x.shape
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(memory_format=torch.channels_last).float(), x.float(), mean, scale, weight.float(),
            n, c, h * w, ctx.groups, ctx.needs_input_grad[:3],
        )  # fmt: skip
        to = [None if g is None else g.to(like.dtype) for g, like in ((dx, x), (dweight, weight), (dbias, weight))]
        return *to, None, None
