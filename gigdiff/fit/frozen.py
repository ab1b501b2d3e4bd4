"""A frozen network with a LoRA in it trains faster: fewer passes over memory than torch's and peft's layers take.

`lighten` changes the classes of a network's layers, nothing of what they hold or are named. In evaluation they are what
they were, so that a picture is the same bits with and without. How much it is worth: docs/lora.md.
"""

from __future__ import annotations

import platform
import weakref
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from gigdiff.packing import _packed, _PackedConv2d, is_rounded, state_of
from gigdiff.precision import cpu_has_bfloat16

__all__ = ["lighten", "lora_product"]

PACKED_BYTES = 512 * 2**20  # two copies of convolutions' weights, at most

# As in gigdiff.packing: by module and not on it.
_TURNED: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = weakref.WeakKeyDictionary()


def lighten(model: nn.Module) -> bool:
    """Let the frozen layers of a network with a LoRA (see `gigdiff.lora.add_adapter`) take fewer passes in training.

    - LoRA layers are one function, see `lora_product`. Those with dropout or DoRA stay peft's.
    - On a CPU that computes in bfloat16, GEGLU layers (half of a block's feed-forward network) are one function too.
    - On an x86 CPU that computes in bfloat16, convolutions keep oneDNN's layout of their weights, for both directions,
      as long as PACKED_BYTES last: oneDNN makes it anew at each call, at low resolutions for as long as the product.

    Returns:
        Whether all convolutions are so, and activations had better lie channels last.
    """
    packs = cpu_has_bfloat16() and platform.machine() in ("x86_64", "AMD64")
    left, every = PACKED_BYTES, packs
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = _LoraLinear
        elif type(module) is GEGLU and type(module.proj) is nn.Linear:
            module.__class__ = _FrozenGEGLU
        elif packs and type(module) in (nn.Conv2d, _PackedConv2d) and module.groups == 1:  # type: ignore[union-attr]
            size = 2 * 2 * module.weight.numel()  # type: ignore[union-attr, operator]
            if module.padding_mode != "zeros" or isinstance(module.padding, str) or size > left:  # type: ignore[union-attr]
                every = False
            else:
                left -= size
                module.__class__ = _FrozenConv2d if type(module) is nn.Conv2d else _FrozenPackedConv2d
    return every and any(isinstance(module, _FrozenConv2d) for module in model.modules())


def lora_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T with gradients for x, A and B, the LoRA added within the product.

    With the gradient g: dx = g W + (scale g B) A, dA = (scale g B)^T x, dB = scale g^T (x A^T). peft computes the
    same by a scaling and an addition of the whole output, and of the whole gradient of x.

    Args:
        x: (..., in).
        weight: (out, in), frozen, in x's dtype. bias: (out,) likewise, or None.
        a, b: lora_A (rank, in) and lora_B (out, rank), float32; rounded to x's dtype for the products.

    Returns:
        (..., out), in x's dtype.
    """
    return _LoraProduct.apply(x, weight, bias, a, b, scale)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's linear layer, for rows (N, in), without its first filling the output with copies of the bias."""
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return torch.nn.functional.linear(rows, weight, bias)


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = a.to(x.dtype), (b * scale).to(x.dtype)
        low = rows @ down.t()
        output = _linear(rows, weight, bias).addmm_(low, up.t())
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scale, ctx.dtype = scale, a.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:  # type: ignore[override]
        rows, weight, down, up, low = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        into, dx = g @ up, None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(into, down).view(*gradient.shape[:-1], -1)
        return dx, None, None, (into.t() @ rows).to(ctx.dtype), (g.t() @ low).to(ctx.dtype) * ctx.scale, None


class _LoraLinear(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind, base = x.device.type, self.get_base_layer()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        one = len(self.active_adapters) == 1 and self.active_adapters[0] in self.lora_A
        plain = torch.is_grad_enabled() and one and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or (dtype is None and not x.dtype == base.weight.dtype == torch.float32):
            return super().forward(x, *args, **kwargs)
        name, dtype = self.active_adapters[0], dtype or x.dtype
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if name in self.lora_variant or not isinstance(dropout, nn.Identity) or b.bias is not None:
            return super().forward(x)
        bias = None if base.bias is None else base.bias.to(dtype)
        return lora_product(x.to(dtype), base.weight.to(dtype), bias, a.weight, b.weight, self.scaling[name])


def _trains_in_bfloat16(x: Tensor) -> bool:
    return torch.is_grad_enabled() and is_rounded(x)


class _FrozenGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _trains_in_bfloat16(hidden_states) or self.proj.weight.requires_grad:
            return super().forward(hidden_states, *args, **kwargs)
        bias = None if self.proj.bias is None else self.proj.bias.bfloat16()
        return _Geglu.apply(hidden_states.bfloat16(), self.proj.weight.bfloat16(), bias)


class _Geglu(torch.autograd.Function):
    """h gelu(g), where x W^T + bias = [h, g] (Shazeer 2020, arXiv 2002.05202): the gradient of both halves is written
    into one tensor, where autograd's would be put together from two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
        both = _linear(rows, weight, bias)
        h, g = both.chunk(2, -1)
        open_gate = torch.nn.functional.gelu(g)
        ctx.save_for_backward(both, open_gate, weight)
        return (h * open_gate).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        both, open_gate, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        h, g = both.chunk(2, -1)
        into = torch.empty_like(both)
        dh, dg = into.chunk(2, -1)
        flat = gradient.reshape(-1, gradient.shape[-1])
        torch.mul(flat, open_gate, out=dh)
        torch.ops.aten.gelu_backward.grad_input(flat * h, g, grad_input=dg)
        return (into @ weight).view(*gradient.shape[:-1], -1), None, None


class _FrozenConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if not _trains_in_bfloat16(input) or self.weight.requires_grad:
            return super().forward(input)
        return _Convolution.apply(input.bfloat16(), self)


class _FrozenPackedConv2d(_FrozenConv2d, _PackedConv2d):
    """Of a network that draws by packed weights, which it goes on doing."""


class _Convolution(torch.autograd.Function):
    """A convolution by packed weights whose gradient for its input is one too: of the weights turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _FrozenConv2d) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.shape = layer, x.shape
        weight, bias = _packed(layer, x)
        return _convolved(x, weight, bias, layer.padding, layer.stride, layer.dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        layer = ctx.layer
        if not ctx.needs_input_grad[0]:
            return None, None
        same = all(2 * p == k - 1 for p, k in zip(layer.padding, layer.kernel_size, strict=True))
        if same and layer.stride == (1, 1) and layer.dilation == (1, 1):
            turned = _turned(layer, gradient)
            return _convolved(gradient, turned, None, layer.padding, (1, 1), (1, 1)), None
        weight = layer.weight.detach().bfloat16()
        return conv2d_input(ctx.shape, weight, gradient, layer.stride, layer.padding, layer.dilation), None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Any, dilation: Any) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, 1, "none", [], "")


def _turned(layer: _FrozenConv2d, gradient: Tensor) -> Tensor:
    """The packed weights (in, out, k, k) of the convolution that takes a gradient back."""
    state = state_of([layer.weight])
    known = _TURNED.get(layer)
    if known is not None and known[0] == state:
        return known[1]
    weight = layer.weight.detach().bfloat16().flip(2, 3).transpose(0, 1).contiguous()
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, layer.padding, (1, 1), (1, 1), 1, gradient.shape)
    _TURNED[layer] = (state, packed)
    return packed
