"""A network trains faster: layers that take fewer passes over memory, or quicker kernels, than torch's and peft's.

`lighten` changes the classes of a network's layers, nothing of what they hold or are named. When drawing they give the
bits that `gigdiff.load` draws with. How much it is worth: docs/lora.md and docs/performance.md.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from gigdiff.group_norm import quicken_group_norms
from gigdiff.packing import (
    _convolution,
    _convolution_layout,
    _linear_layout,
    _PackedConv2d,
    _PackedLinear,
    can_pack,
    is_rounded,
    state_of,
)

__all__ = ["lighten", "lora_product"]

PACKED_BYTES = 512 * 2**20  # two copies of convolutions' weights, at most
FEW_PLACES = 20  # of an image, up to which a 3 x 3 convolution by frozen weights is quicker as a product with patches
PATCHED_PLACES = 64  # of an output, up to which a gradient for 3 x 3 weights is quicker as a product with patches

# As in gigdiff.packing: by module and not on it.
_LAID_OUT: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[object, Tensor]]] = weakref.WeakKeyDictionary()


def lighten(model: nn.Module) -> bool:
    """Let a network's layers train in fewer or quicker passes: a whole network, or a frozen one with a LoRA in it.

    - LoRA layers (see `gigdiff.lora.add_adapter`) are one function, see `lora_product`. Those with dropout or DoRA stay
      peft's.
    - Group norms: see `gigdiff.group_norm`.
    - On a CPU that computes in bfloat16, GEGLU layers (half of a block's feed-forward network) are one function too.
    - There, if it is an x86 one, frozen convolutions keep oneDNN's layout of their weights, for both directions, as
      long as PACKED_BYTES last: oneDNN makes it anew at each call, at low resolutions for as long as the product. Those
      that are trained get their weights' gradient by a plain product where oneDNN's own is slow.

    Returns:
        Whether all convolutions are frozen and keep that layout: activations had better lie channels last then.
    """
    packs = can_pack()
    left, every = PACKED_BYTES, packs
    quicken_group_norms(model)
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = _LoraLinear
        elif type(module) is GEGLU and type(module.proj) in (nn.Linear, _PackedLinear):
            module.__class__ = _Geglu
        elif packs and type(module) in (nn.Conv2d, _PackedConv2d) and module.groups == 1:  # type: ignore[union-attr]
            size = 2 * 2 * module.weight.numel()  # type: ignore[union-attr, operator]
            plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)  # type: ignore[union-attr]
            frozen = not module.weight.requires_grad  # type: ignore[union-attr]
            every = every and plain and frozen and size <= left
            if plain and not frozen:
                module.__class__ = _TrainedConv2d
            elif plain and size <= left:
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
    return F.linear(rows, weight, bias)


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


class _Geglu(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _trains_in_bfloat16(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        bias = None if self.proj.bias is None else self.proj.bias.bfloat16()
        return _GegluProduct.apply(hidden_states.bfloat16(), self.proj.weight.bfloat16(), bias)


class _GegluProduct(torch.autograd.Function):
    """h gelu(g), where x W^T + bias = [h, g] (Shazeer 2020, arXiv 2002.05202): the gradient of both halves is written
    into one tensor, where autograd's would be put together from two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
        both = _linear(rows, weight, bias)
        h, g = both.chunk(2, -1)
        open_gate = F.gelu(g)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, both, open_gate, weight)
        return (h * open_gate).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        rows, both, open_gate, weight = ctx.saved_tensors
        if not any(ctx.needs_input_grad):
            return None, None, None
        h, g = both.chunk(2, -1)
        into = torch.empty_like(both)
        dh, dg = into.chunk(2, -1)
        flat = gradient.reshape(-1, gradient.shape[-1])
        torch.mul(flat, open_gate, out=dh)
        torch.ops.aten.gelu_backward.grad_input(flat * h, g, grad_input=dg)
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            (into @ weight).view(*gradient.shape[:-1], -1) if dx else None,
            into.t() @ rows if dweight else None,
            into.sum(0) if dbias else None,
        )


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


def _convolved(x: Tensor, layer: _FrozenConv2d, bias: Tensor | None, turned: bool) -> Tensor:
    """The layer's convolution of x, or if `turned` that which takes a gradient back.

    Where the kernel is one place, or the image few, it is a product with what each place sees.
    """
    n, _, h, w = x.shape
    k = layer.kernel_size[0]
    product = _keeps_size(layer) and layer.kernel_size in ((1, 1), (3, 3)) and (k == 1 or h * w <= FEW_PLACES)
    weight = _laid_out(layer, x, turned, product)
    if product:
        patches = _patches(x, k, (1, 1), (k // 2, k // 2), x.shape[2:])
        return _linear(patches, weight, bias).view(n, h, w, -1).permute(0, 3, 1, 2)
    return _convolution(layer, x, weight, bias)


def _laid_out(layer: _FrozenConv2d, x: Tensor, turned: bool, product: bool) -> Tensor:
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


class _TrainedConv2d(_PackedConv2d):
    def forward(self, input: Tensor) -> Tensor:
        k, trains = self.kernel_size, self.weight.requires_grad and _trains_in_bfloat16(input)
        if not trains or self.dilation != (1, 1) or k not in ((1, 1), (3, 3)):
            return super().forward(input)
        places = input.shape[2] * input.shape[3] // (self.stride[0] * self.stride[1])
        if k == (3, 3) and places > PATCHED_PLACES:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.bfloat16()
        return _TrainedConvolution.apply(input.bfloat16(), self.weight.bfloat16(), bias, self.stride, self.padding)


class _TrainedConvolution(torch.autograd.Function):
    """A convolution whose gradient for its weights is one product of the output's gradient and the input's patches.

    oneDNN's kernel for it works on rows of an image, and those of small images fill no vector.
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
            patches = _patches(x, weight.shape[-1], ctx.stride, ctx.padding, gradient.shape[2:])
            o, c, k, _ = weight.shape
            dweight = (rows.t() @ patches).view(o, k, k, c).permute(0, 3, 1, 2)
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


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
