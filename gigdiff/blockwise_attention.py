"""softmax(q k^T) v for training on a CPU: torch's matrix products, a thousand queries of a few heads at a time.

torch's own kernel for CPUs (SDPA) works on small tiles, whose products in bfloat16 run at a third of what the cores
give; on a CPU with AMX only its backward pass does, and its forward pass is taken. Here a tile is 1,024 queries by all
keys, of some heads. As there, the backward pass computes the probabilities again. Where they take little memory, all
heads are one batched product and probabilities are kept. How much that is worth: docs/lora.md.

With P = softmax(S), S = q k^T / sqrt(d), O = P v and the gradient dO (FlashAttention, Dao et al. 2022, arXiv
2205.14135, appendix B.2): dv = P^T dO, dP = dO v^T, dS = P (dP - sum over keys of P dP), dq = dS k / sqrt(d),
dk = dS^T q / sqrt(d).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gigdiff.precision import cpu_has_amx

__all__ = ["Blockwise", "blockwise_attention"]

QUERIES = 1024  # of a tile; with fewer it was slower
HEADS, HEADS_AMX = 2, 4  # with fewer it was slower, with more as fast or slower
KEPT_BYTES, KEPT_BYTES_AMX = 64 * 2**20, 16 * 2**20  # probabilities of a layer that are kept; up to
KEPT_SCORES = 2**19  # queries x keys of a head, such as to a prompt's 77 tokens, they are in any case


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention without a mask, with gradients for q, k and v.

    Args:
        q: (..., N, d).
        k, v: (..., M, d), with q's leading sizes and dtype. Products are in that dtype; in bfloat16 scores are rounded
            to it, as plain attention's are and SDPA's are not.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        Like q.
    """
    leading, scale = q.shape[:-2], q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    scores_of_head = q.shape[1] * k.shape[1]
    amx = q.dtype == torch.bfloat16 and q.shape[2] == v.shape[2] and cpu_has_amx()
    kept = KEPT_BYTES_AMX if amx else KEPT_BYTES
    if scores_of_head <= KEPT_SCORES or len(q) * scores_of_head * q.element_size() <= kept:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
        output = torch.bmm(scores.softmax(-1), v)
    else:
        output = _Tiles.apply(q, k, v, scale, amx)
    return output.view(*leading, *output.shape[1:])


class _Tiles(torch.autograd.Function):
    """The same over tiles; q (R, N, d), k and v (R, M, d). With `amx` torch's kernel goes forward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, amx: bool) -> Tensor:
        ctx.scale, ctx.heads = scale, HEADS_AMX if amx else HEADS
        if amx:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            output, logs = kernel(q[None], k[None], v[None], scale=scale)
            ctx.save_for_backward(q, k, v, logs[0])
            return output[0]
        ctx.save_for_backward(q, k, v, None)
        buffers = q.new_empty(2, ctx.heads * min(QUERIES, q.shape[1]) * k.shape[1])
        output = torch.empty_like(q)
        for heads in _tiles(len(q), ctx.heads):
            for tile in _tiles(q.shape[1], QUERIES):
                scores, p = _as_scores(buffers, heads, tile, k)
                _softmax_into(p, scores, q[heads, tile], k[heads], scale)
                output[heads, tile] = torch.bmm(p, v[heads])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, logs = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        buffers = q.new_empty(2, ctx.heads * min(QUERIES, q.shape[1]) * k.shape[1])
        if logs is not None:
            q_less, k_less = _with_logs(q, k, logs / ctx.scale)
        for heads in _tiles(len(q), ctx.heads):
            # Transposed once a head: a product that transposes its tile takes half as long again. In float32: sums over
            # tiles would lose bits in bfloat16.
            q_t, gradient_t = (x[heads].transpose(1, 2).contiguous() for x in (q, gradient))
            dk_t, dv_t = (torch.zeros_like(x[heads].transpose(1, 2), dtype=torch.float32) for x in (k, v))
            for tile in _tiles(q.shape[1], QUERIES):
                ds, p = _as_scores(buffers, heads, tile, k)
                if logs is None:
                    _softmax_into(p, ds, q[heads, tile], k[heads], ctx.scale)
                else:
                    _scores_into(p, q_less[heads, tile], k_less[heads], ctx.scale * math.log2(math.e)).exp2_()
                dv_t += torch.bmm(gradient_t[..., tile], p)
                torch.bmm(gradient[heads, tile], v[heads].transpose(1, 2), out=ds)  # dP
                torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
                dq[heads, tile] = torch.bmm(ds, k[heads]).mul_(ctx.scale)
                dk_t += torch.bmm(q_t[..., tile], ds)
            dk[heads], dv[heads] = dk_t.transpose(1, 2) * ctx.scale, dv_t.transpose(1, 2)
        return dq, dk, dv, None, None


def _with_logs(q: Tensor, k: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with two numbers more, so that their products are less by logs (R, N).

    Subtracted within the product, which sums in float32; from rounded scores it would leave probabilities a bit less.
    """
    high = logs.to(q.dtype)
    low = (logs - high).to(q.dtype)
    return torch.cat([q, high[..., None], low[..., None]], -1), torch.cat([k, k.new_full((*k.shape[:-1], 2), -1)], -1)


def _tiles(places: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, places)) for start in range(0, places, size)]


def _as_scores(buffers: Tensor, heads: slice, tile: slice, k: Tensor) -> Tensor:
    """The beginnings of buffers (n, numbers) as (n, heads, queries, keys), each contiguous."""
    shape = heads.stop - heads.start, tile.stop - tile.start, k.shape[1]
    return buffers[:, : shape[0] * shape[1] * shape[2]].view(-1, *shape)


def _softmax_into(p: Tensor, scores: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """softmax(q k^T scale) into p, by way of scores."""
    torch.softmax(_scores_into(scores, q, k, scale), -1, out=p)


def _scores_into(scores: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)


class Blockwise:
    """A diffusers attention processor whose calls of scaled_dot_product_attention become `blockwise_attention`.

    Args:
        processor: one that calls it. What has a mask, dropout or shared keys stays torch's.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """As the processor."""
        with _Routed():
            return self.processor(attn, *args, **kwargs)


class _Routed(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention's signature."""
    if attn_mask is None and not dropout_p and not is_causal and query.shape[:-2] == key.shape[:-2]:
        return blockwise_attention(query, key, value, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
