"""The same bits for an image alone and in a batch, in float32 on a CPU.

A float32 matrix product over all rows of a batch picks its kernel, and with it the order of its sums, by the number of
rows. Convolutions, norms and attention do not on the CPUs seen so far, nor does anything under bfloat16 autocast but
long sums on a CPU with AMX, for which see gigdiff.packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["PerSampleLinear", "per_sample", "rows_stand_alone"]


class PerSampleLinear(TorchFunctionMode):
    """Inside, a linear layer is one product a sample, of the same shape whatever the batch: as fast, and exact."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return per_sample(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def per_sample(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear layer, one product of the same shape for each of `input`'s (N, ..., in) samples."""
    if input.ndim < 2:
        return F.linear(input, weight, bias)
    rows = input.reshape(len(input), -1, input.shape[-1])
    if len(rows) == 1:  # a batch of one is no batch to the kernels: they would take the plain product
        rows = rows.expand(2, -1, -1)
    weights = weight.T.expand(len(rows), -1, -1)
    out = torch.bmm(rows, weights) if bias is None else torch.baddbmm(bias, rows, weights)
    return out[: len(input)].view(*input.shape[:-1], weight.shape[0])


@torch.no_grad()
def rows_stand_alone(call: Callable[..., Tensor], batch: Sequence[Tensor], rows: Sequence[int]) -> bool:
    """Whether `call(*batch)` gives the same bits at `rows` as `call` on those rows alone."""
    together = call(*batch)[list(rows)]
    return torch.equal(together, call(*(x[list(rows)] for x in batch)))
