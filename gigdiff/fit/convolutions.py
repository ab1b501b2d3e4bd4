"""Convolutions that train faster on a CPU in bfloat16, frozen or trained, than torch's (see `gigdiff.fit.layers`)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from gigdiff.packing import (
    _convolution,
    _convolution_layout,
    _is_linear,
    _linear_layout,
    _PackedConv2d,
    is_rounded,
    state_of,
)

__all__ = ["FrozenConv2d", "FrozenPackedConv2d", "TrainedConv2d", "linear", "trains_in_bfloat16"]

FEW_PLACES = 20  # of an image, up to which a 3 x 3 convolution by frozen weights is quicker as a product with patches
NARROW = 10  # an output's width, up to which a gradient for 3 x 3 weights is quicker as a product with patches

# As in gigdiff.packing: by module and not on it.
_LAID_OUT: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[object, Tensor]]] = weakref.WeakKeyDictionary()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's linear layer, for rows (N, in), without its first filling the output with copies of the bias."""
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def trains_in_bfloat16(x: Tensor) -> bool:
    """Whether a layer given x computes in bfloat16 on a CPU, for a gradient."""
    return torch.is_grad_enabled() and is_rounded(x)


class FrozenConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if not trains_in_bfloat16(input) or self.weight.requires_grad:
            return super().forward(input)
        return _Convolution.apply(input.bfloat16(), self)


class FrozenPackedConv2d(FrozenConv2d, _PackedConv2d):
    """Of a network that draws by packed weights, which it goes on doing."""


class _Convolution(torch.autograd.Function):
    """A convolution by packed weights whose gradient for its input is one too: of the weights turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.shape = layer, x.shape
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        return _convolved(x, layer, bias, turned=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        layer = ctx.layer
        if not ctx.needs_input_grad[0]:
            return None, None
        if _keeps_size(layer):
            return _convolved(gradient, layer, None, turned=True), None
        weight = layer.weight.detach().bfloat16()
        return conv2d_input(ctx.shape, weight, gradient, layer.stride, layer.padding, layer.dilation), None


def _keeps_size(layer: nn.Conv2d) -> bool:
    """Whether the gradient for its input is a convolution with the same settings."""
    same = all(2 * p == k - 1 for p, k in zip(layer.padding, layer.kernel_size, strict=True))  # type: ignore[operator]
    return same and layer.stride == (1, 1) and layer.dilation == (1, 1)


def _convolved(x: Tensor, layer: FrozenConv2d, bias: Tensor | None, turned: bool) -> Tensor:
    """The layer's convolution of x, or if `turned` that which takes a gradient back.

    Where the kernel is one place, or the image few, it is a product with what each place sees.
    """
    n, _, h, w = x.shape
    k = layer.kernel_size[0]
    product = _keeps_size(layer) and layer.kernel_size in ((1, 1), (3, 3)) and (k == 1 or h * w <= FEW_PLACES)
    weight = _laid_out(layer, x, turned, product)
    if product:
        patches = _patches(x, k, (1, 1), (k // 2, k // 2), x.shape[2:])
        return linear(patches, weight, bias).view(n, h, w, -1).permute(0, 3, 1, 2)
    return _convolution(layer, x, weight, bias)


def _laid_out(layer: FrozenConv2d, x: Tensor, turned: bool, product: bool) -> Tensor:
    """The layer's weights in oneDNN's layout for inputs like x; if `turned`, in and out have changed places."""
    known, state = _LAID_OUT.setdefault(layer, {}), (product, state_of([layer.weight]))
    if turned in known and known[turned][0] == state:
        return known[turned][1]
    weight = layer.weight.detach().bfloat16()
    if turned:
        weight = weight.flip(2, 3).transpose(0, 1).contiguous()
    if product:
        packed = _linear_layout(weight.permute(0, 2, 3, 1).flatten(1).contiguous(), x[:, 0].numel())
    else:
        packed = _convolution_layout(layer, weight, x)
    known[turned] = (state, packed)
    return packed


class TrainedConv2d(_PackedConv2d):
    """A convolution that is trained: 1 x 1 as a linear layer, 3 x 3 with a quicker gradient where images are narrow."""

    def forward(self, input: Tensor) -> Tensor:
        narrow = self.kernel_size == (3, 3) and self.dilation == (1, 1) and input.shape[3] // self.stride[1] <= NARROW
        trains = self.weight.requires_grad and trains_in_bfloat16(input)
        if not trains or not (narrow or _is_linear(self)):
            return super().forward(input)
        input, weight = input.bfloat16(), self.weight.bfloat16()
        bias = None if self.bias is None else self.bias.bfloat16()
        if narrow:
            return _TrainedConvolution.apply(input, weight, bias, self.stride, self.padding)
        return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class _TrainedConvolution(torch.autograd.Function):
    """A convolution whose gradient for its weights is one product with patches, of its input or its output's gradient.

    oneDNN's kernel for it works on rows of an image, and those of narrow images fill no vector.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), dx, dweight = ctx.saved_tensors, None, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(x.shape, weight, gradient, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            dweight = _weights_gradient(x, gradient, rows, weight.shape[-1], ctx.stride, ctx.padding)
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _weights_gradient(
    x: Tensor, gradient: Tensor, rows: Tensor, k: int, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """(O, C, k, k), channels last, for x (N, C, H, W) and the output's gradient, also given as rows (N h w, O)."""
    c, o = x.shape[1], gradient.shape[1]
    if o < c and x.shape[2:] == gradient.shape[2:] and stride == (1, 1):
        # The narrower of the two has less to copy. What a place of x is seen by are patches of the gradient, turned.
        patches = _patches(gradient, k, stride, padding, x.shape[2:])
        turned = (patches.t() @ x.permute(0, 2, 3, 1).reshape(-1, c)).view(k, k, o, c)
        return turned.flip(0, 1).permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)
    patches = _patches(x, k, stride, padding, gradient.shape[2:])
    return (rows.t() @ patches).view(o, k, k, c).permute(0, 3, 1, 2)


def _patches(x: Tensor, k: int, stride: tuple[int, int], padding: tuple[int, int], size: torch.Size) -> Tensor:
    """What an output of `size` (h, w) sees of x (N, C, H, W): (N h w, k k C)."""
    n, c = x.shape[:2]
    x = x.permute(0, 2, 3, 1)
    if any(padding):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    x = x.contiguous()
    image, row, place, _ = x.stride()
    strides = (image, stride[0] * row, stride[1] * place, row, place, 1)
    return x.as_strided((n, *size, k, k, c), strides).reshape(-1, k * k * c)
