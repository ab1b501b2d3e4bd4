"""softmax(q k^T) v for training on a CPU: torch's matrix products, about a thousand queries of one head at a time.

torch's own kernel for CPUs (SDPA) works on small tiles, whose products in bfloat16 run at a third of what the cores
give. Here a tile is 1,024 queries by all keys. As there, the backward pass computes the probabilities again: keeping
them was no faster, for the memory had to come from somewhere. Small attentions, such as to a prompt's 77 tokens, are
one batched product. How much that is worth: docs/lora.md.

With P = softmax(S), S = q k^T / sqrt(d), O = P v and the gradient dO (FlashAttention, Dao et al. 2022, arXiv
2205.14135, appendix B.2): dv = P^T dO, dP = dO v^T, dS = P (dP - sum over keys of P dP), dq = dS k / sqrt(d),
dk = dS^T q / sqrt(d).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Blockwise", "blockwise_attention"]

QUERIES = 1024  # a tile; in halves of it or twice it a step was as fast or slower
BATCHED_SCORES = 2**19  # queries x keys of one head up to which all heads are one product


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
    if q.shape[1] * k.shape[1] <= BATCHED_SCORES:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
        output = torch.bmm(scores.softmax(-1), v)
    else:
        output = _Tiles.apply(q, k, v, scale)
    return output.view(*leading, *output.shape[1:])


class _Tiles(torch.autograd.Function):
    """The same over tiles; q (R, N, d), k and v (R, M, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        scores, p = q.new_empty(2, min(QUERIES, q.shape[1]), k.shape[1])
        output = torch.empty_like(q)
        for row in range(len(q)):
            for tile in _tiles(q.shape[1]):
                _softmax_into(p, scores, q[row, tile], k[row], scale)
                torch.mm(p[: tile.stop - tile.start], v[row], out=output[row, tile])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        buffers = q.new_empty(3, min(QUERIES, q.shape[1]), k.shape[1])
        for row in range(len(q)):
            # Transposed once a head: a product that transposes its tile takes half as long again. In float32: sums over
            # tiles would lose bits in bfloat16.
            q_t, gradient_t = q[row].t().contiguous(), gradient[row].t().contiguous()
            dk_t, dv_t = (torch.zeros(x.shape[:0:-1], dtype=torch.float32, device=x.device) for x in (k, v))
            for tile in _tiles(q.shape[1]):
                ds, p, dp = buffers[:, : tile.stop - tile.start]
                _softmax_into(p, ds, q[row, tile], k[row], ctx.scale)
                dv_t += gradient_t[:, tile] @ p
                torch.mm(gradient[row, tile], v[row].t(), out=dp)
                torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
                torch.addmm(dq[row, tile], ds, k[row], beta=0, alpha=ctx.scale, out=dq[row, tile])
                dk_t += q_t[:, tile] @ ds
            dk[row], dv[row] = dk_t.t() * ctx.scale, dv_t.t()
        return dq, dk, dv, None


def _tiles(places: int) -> list[slice]:
    return [slice(start, min(start + QUERIES, places)) for start in range(0, places, QUERIES)]


def _softmax_into(p: Tensor, scores: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """softmax(q k^T scale) into the first rows of p, by way of those of scores."""
    p, scores = p[: len(q)], scores[: len(q)]
    torch.addmm(scores, q, k.t(), beta=0, alpha=scale, out=scores)
    torch.softmax(scores, -1, out=p)


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
