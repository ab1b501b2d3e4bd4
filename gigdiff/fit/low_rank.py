"""Training only what a LoRA can hold, while the network computes with whole weights.

Hu et al. 2021 (arXiv 2106.09685): W = W0 + up down of a low rank. The product is added to the base's weights after each
step, and the factors' gradients are made of the weights' (dup = dW down^T, ddown = up^T dW): forward and backward are
those of a network that is trained whole, with all of `gigdiff.fit.layers`. `gigdiff.lora.extract` finds the factors
again in the end, without loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gigdiff import rng
from gigdiff.lora import adaptable, leading_terms

__all__ = ["LowRankDifference"]


class LowRankDifference(nn.Module):
    """What a network's linear and convolution layers have over those of its base, as products of `rank`.

    The network becomes the base with these products: it starts nearest to what it was (`leading_terms`), and the other
    weights, which have no place in a LoRA, are the base's and no longer trained.

    Attributes:
        down, up: of each layer, (rank, in * kernel) and (out, rank), float32, on the network's device: the parameters.
    """

    def __init__(self, model: nn.Module, base: nn.Module, rank: int, *, seed: int) -> None:
        """
        Args:
            model: the network, float32. base: another of the same sizes, on any device. rank: at least 1.
            seed: of `down` where a layer does not differ from the base's.
        """
        super().__init__()
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        names, parameters = adaptable(model), dict(model.named_parameters())
        weights = {f"{name}.weight" for name in names}
        self._layers: list[tuple[Tensor, Tensor]] = []  # the weight and the base's; not what a checkpoint keeps
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                ours = parameters[name]
                theirs = parameter.to(ours)
                if name not in weights:
                    ours.copy_(theirs).requires_grad_(False)
                    continue
                difference = (ours - theirs).flatten(1)
                down, up = leading_terms(difference, rank)
                if not difference.any():
                    generator = rng.generator(seed, f"low rank {name}", 0)
                    down = torch.randn(down.shape, generator=generator).to(down) / math.sqrt(down.shape[1])
                # The decomposition's are column after column; fused AdamW walks them beside their gradients in memory.
                self.down.append(nn.Parameter(down.contiguous()))
                self.up.append(nn.Parameter(up.contiguous()))
                self._layers.append((ours, theirs.clone()))
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Give the network the weights that the factors mean."""
        for (weight, base), down, up in zip(self._layers, self.down, self.up, strict=True):
            weight.copy_(base + (up @ down).view_as(base))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Make the factors' gradients of the network's, which are freed."""
        for (weight, _), down, up in zip(self._layers, self.down, self.up, strict=True):
            gradient: Any = weight.grad
            gradient = gradient.flatten(1)
            down.grad, up.grad, weight.grad = up.t() @ gradient, gradient @ down.t(), None
