"""A network trains faster: layers that take fewer passes over memory, or quicker kernels, than torch's and peft's.

`lighten` changes the classes of a network's layers, nothing of what they hold or are named. When drawing they give the
bits that `gigdiff.load` draws with. How much it is worth: docs/lora.md and docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from gigdiff.fit.convolutions import FrozenConv2d, FrozenPackedConv2d, TrainedConv2d, linear, trains_in_bfloat16
from gigdiff.group_norm import quicken_group_norms
from gigdiff.packing import _PackedConv2d, _PackedLinear, can_pack

__all__ = ["lighten", "lora_product"]

PACKED_BYTES = 512 * 2**20  # two copies of convolutions' weights, at most


def lighten(model: nn.Module) -> bool:
    """Let a network's layers train in fewer or quicker passes: a whole network, or a frozen one with a LoRA in it.

    - LoRA layers (see `gigdiff.lora.add_adapter`) are one function, see `lora_product`. Those with dropout or DoRA stay
      peft's.
    - Group norms: see `gigdiff.group_norm`.
    - On a CPU that computes in bfloat16, GEGLU layers (half of a block's feed-forward network) are one function too,
      and so is plain attention (`--attention math`) with its three projections, unless they have a LoRA. Blocks of a
      UNet leave activations channels last, where diffusers' own turn them twice.
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
        elif type(module) is Attention:
            module.__class__ = _Attention
        elif type(module) is ResnetBlock2D:
            module.__class__ = _ResnetBlock2D
        elif type(module) is Transformer2DModel:
            module.__class__ = _Transformer2DModel
        elif packs and type(module) in (nn.Conv2d, _PackedConv2d) and module.groups == 1:  # type: ignore[union-attr]
            size = 2 * 2 * module.weight.numel()  # type: ignore[union-attr, operator]
            plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)  # type: ignore[union-attr]
            frozen = not module.weight.requires_grad  # type: ignore[union-attr]
            every = every and plain and frozen and size <= left
            if plain and not frozen:
                module.__class__ = TrainedConv2d
            elif plain and size <= left:
                left -= size
                module.__class__ = FrozenConv2d if type(module) is nn.Conv2d else FrozenPackedConv2d
    return every and any(isinstance(module, FrozenConv2d) for module in model.modules())


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


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = a.to(x.dtype), (b * scale).to(x.dtype)
        low = rows @ down.t()
        output = linear(rows, weight, bias).addmm_(low, up.t())
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


class _Geglu(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not trains_in_bfloat16(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        bias = None if self.proj.bias is None else self.proj.bias.bfloat16()
        return _GegluProduct.apply(hidden_states.bfloat16(), self.proj.weight.bfloat16(), bias)


class _GegluProduct(torch.autograd.Function):
    """h gelu(g), where x W^T + bias = [h, g] (Shazeer 2020, arXiv 2002.05202).

    Two products, each with a half of W: what goes over halves of the rows of one result is twice as slow on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
        (to_h, to_g), biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
        h, g = linear(rows, to_h, biases[0]), linear(rows, to_g, biases[1])
        open_gate = F.gelu(g)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, h, g, open_gate, weight)
        return (h * open_gate).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        rows, h, g, open_gate, weight = ctx.saved_tensors
        flat, (to_h, to_g), dx, dweight, dbias = (
            gradient.reshape(-1, gradient.shape[-1]),
            weight.chunk(2),
            None,
            None,
            None,
        )
        dh = flat * open_gate
        dg = torch.ops.aten.gelu_backward(flat * h, g)
        if ctx.needs_input_grad[0]:
            dx = (dh @ to_h).addmm_(dg, to_g).view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dweight = torch.cat([dh.t() @ rows, dg.t() @ rows])
        if ctx.needs_input_grad[2]:
            dbias = torch.cat([dh.sum(0), dg.sum(0)])
        return dx, dweight, dbias


class _Attention(Attention):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if kwargs or attention_mask is not None or not self._is_plain(hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        text = None if encoder_hidden_states is None else encoder_hidden_states.bfloat16()
        weights = [layer.weight.bfloat16() for layer in (self.to_q, self.to_k, self.to_v)]
        attended = _AttentionProduct.apply(hidden_states.bfloat16(), text, *weights, self.heads, self.scale)
        return self.to_out[1](self.to_out[0](attended))

    def _is_plain(self, x: Tensor) -> bool:
        """Whether AttnProcessor, which is to be the processor, would only project, attend and project."""
        more = self.spatial_norm, self.group_norm, self.norm_q, self.norm_k, self.norm_cross, self.added_kv_proj_dim
        layers = self.to_q, self.to_k, self.to_v
        return (
            type(self.processor) is AttnProcessor and trains_in_bfloat16(x) and x.dim() == 3
            and all(part is None for part in more) and not self.residual_connection and self.rescale_output_factor == 1
            and not self.upcast_attention and not self.upcast_softmax
            and all(type(layer) in (nn.Linear, _PackedLinear) and layer.bias is None for layer in layers)
            and len({layer.out_features for layer in layers}) == 1
        )  # fmt: skip


class _AttentionProduct(torch.autograd.Function):
    """softmax(s q k^T) v of each head; q = x Wq^T, k = t Wk^T, v = t Wv^T, and t is the text, or x if that is None.

    Projections of the same rows are one product, and their heads are laid out together; for the gradients (see
    `gigdiff.blockwise_attention`) likewise. x (N, L, C), t (N, M, D) -> (N, L, heads d), in bfloat16.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, text: Tensor | None, to_q: Tensor, to_k: Tensor, to_v: Tensor, heads: int, scale: float
    ) -> Tensor:
        if text is None:
            q, k, v = _heads(x, (to_q, to_k, to_v), heads)
        else:
            (q,), (k, v) = _heads(x, (to_q,), heads), _heads(text, (to_k, to_v), heads)
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
        p = scores.softmax(-1)
        output = torch.bmm(p, v).view(len(x), heads, *q.shape[1:])
        ctx.save_for_backward(x, text, to_q, to_k, to_v, q, k, v, p)
        ctx.heads, ctx.scale = heads, scale
        return output.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, text, to_q, to_k, to_v, q, k, v, p = ctx.saved_tensors
        gradient = gradient.unflatten(2, (ctx.heads, -1)).transpose(1, 2).reshape(q.shape)
        # Together where one product takes them back: for q, k and v, or for q alone and k and v.
        into = [q.new_empty(3, *q.shape)] if text is None else [q.new_empty(1, *q.shape), q.new_empty(2, *k.shape)]
        dq, dk, dv = (part for together in into for part in together)
        torch.bmm(p.transpose(1, 2), gradient, out=dv)
        ds = torch._softmax_backward_data(torch.bmm(gradient, v.transpose(1, 2)), p, -1, p.dtype)
        torch.baddbmm(dq, ds, k, beta=0, alpha=ctx.scale, out=dq)
        torch.baddbmm(dk, ds.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=dk)
        needs_x, needs_text, *needs_weights = ctx.needs_input_grad[:5]
        if text is None:
            dx, dweights = _from_heads(into[0], x, (to_q, to_k, to_v), needs_x, any(needs_weights))
            return dx, None, *dweights, None, None
        dx, dweight = _from_heads(into[0], x, (to_q,), needs_x, needs_weights[0])
        dtext, dweights = _from_heads(into[1], text, (to_k, to_v), needs_text, any(needs_weights[1:]))
        return dx, dtext, *dweight, *dweights, None, None


def _heads(x: Tensor, weights: tuple[Tensor, ...], heads: int) -> Tensor:
    """Each weight's projection of x (N, L, C), heads first: (weights, N heads, L, d)."""
    n, length, _ = x.shape
    projected = x.reshape(n * length, -1) @ torch.cat(weights).t()
    apart = projected.view(n, length, len(weights), heads, -1).permute(2, 0, 3, 1, 4)
    return apart.reshape(len(weights), n * heads, length, -1)


def _from_heads(
    gradient: Tensor, x: Tensor, weights: tuple[Tensor, ...], needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """`_heads` backwards: the gradients for x and for each of the weights."""
    n, length, _ = x.shape
    apart = gradient.view(len(weights), n, -1, length, gradient.shape[-1])
    rows = apart.permute(1, 3, 0, 2, 4).reshape(n * length, -1)
    dx = (rows @ torch.cat(weights)).view(x.shape) if needs_x else None
    none = (None,) * len(weights)
    return dx, (rows.t() @ x.reshape(n * length, -1)).chunk(len(weights)) if needs_weights else none


class _ResnetBlock2D(ResnetBlock2D):
    """diffusers' lays the shortcut's input out channels first in training, and divides by a factor of 1."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default"
        plain = plain and not self.skip_time_act and self.output_scale_factor == 1
        if args or kwargs or not plain or not trains_in_bfloat16(input_tensor):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if temb is not None and self.time_emb_proj is not None:
            x = x + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        x = self.conv2(self.dropout(self.nonlinearity(self.norm2(x))))
        return x + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


class _Transformer2DModel(Transformer2DModel):
    """diffusers' lays the output out channels first."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not trains_in_bfloat16(residual):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        as_image = hidden_states.reshape(batch_size, height, width, inner_dim)
        if self.use_linear_projection:
            return self.proj_out(as_image).permute(0, 3, 1, 2) + residual
        return self.proj_out(as_image.permute(0, 3, 1, 2)) + residual
