"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """theta_ema <- d theta_ema + (1 - d) theta after each step, d = min(decay, (1 + n) / (10 + n)) for update n.

    The warm-up of d keeps the first, random weights from lingering (as in Karras et al. 2024, arXiv 2312.02696, the
    window grows with the run). Kept in float32, on the model's device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Fold the model's current weights in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` carries the averaged weights; its own come back afterwards."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._copy(self.shadow, model)
        try:
            yield
        finally:
            self._copy(own, model)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(source[name])

    def load(self, shadow: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint's `shadow` and `updates`."""
        for name, tensor in self.shadow.items():
            tensor.copy_(shadow[name])
        self.updates = updates
