"""How the GAN and the VAE hear text: the same condition as the diffusion model, `TextEmbedding.condition()`.

A condition is (N, 1 + L, D): the pooled sentence vector (unit mean square), then the token states, zeros for padding.
The pooled vector goes through `TextSummary` into styles and projections; the tokens are asked by attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TextSummary", "TokenAttention", "blur_condition", "split_condition"]


def split_condition(condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 1 + L, D) -> pooled (N, D), tokens (N, L, D), mask bool (N, L): True where a token is not padding."""
    pooled, tokens = condition[:, 0], condition[:, 1:]
    return pooled, tokens, tokens.abs().amax(-1) > 0


def blur_condition(condition: Tensor, noise: Tensor, strength: float) -> Tensor:
    """Each row plus `strength` times its own root mean square times `noise`; padding stays zero.

    Conditioning augmentation (Zhang et al. 2017, StackGAN, arXiv 1612.03242, section 3.2, with a fixed variance):
    catalogue names are nearly unique, so without it a discriminator can learn by heart which photo a name belongs to.
    """
    return condition + strength * condition.square().mean(-1, keepdim=True).sqrt() * noise


class TextSummary(nn.Module):
    """Condition (N, 1 + L, text_dim) -> one vector (N, width).

    `heads` learned questions are put to the tokens by attention; their answers and the pooled vector are mixed.
    """

    def __init__(self, text_dim: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(heads, width // heads))
        self.keys = nn.Linear(text_dim, width)
        self.values = nn.Linear(text_dim, width)
        self.pooled = nn.Linear(text_dim, width)
        self.mix = nn.Linear(width, width)

    def forward(self, condition: Tensor) -> Tensor:
        pooled, tokens, mask = split_condition(condition)
        heads, size = self.questions.shape
        keys, values = (layer(tokens).unflatten(-1, (heads, size)) for layer in (self.keys, self.values))
        scores = (keys * self.questions).sum(-1) * size**-0.5  # (N, L, heads)
        weights = scores.masked_fill(~mask.unsqueeze(-1), -torch.inf).softmax(1)
        found = (weights.unsqueeze(-1) * values).sum(1).flatten(1)
        return self.mix(F.silu(self.pooled(pooled) + found))


class TokenAttention(nn.Module):
    """x + what each of its positions finds in the tokens: x (N, C, H, W), condition (N, 1 + L, text_dim).

    Queries and keys have unit length, their product a learned scale (Henry et al. 2020, arXiv 2010.04245): without
    normalisation layers before it, plain attention can run away. The output projection starts at zero.
    """

    def __init__(self, channels: int, text_dim: int, heads: int = 4, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Conv2d(channels, heads * head_dim, 1)
        self.keys = nn.Linear(text_dim, heads * head_dim)
        self.values = nn.Linear(text_dim, heads * head_dim)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), 8.0))
        self.out = nn.Conv2d(heads * head_dim, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        _, tokens, mask = split_condition(condition)
        n, _, h, w = x.shape
        q = self.queries(x).view(n, self.heads, -1, h * w).transpose(2, 3)  # (N, heads, HW, size)
        k, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.keys, self.values))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.scale
        weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        found = (weights.to(v.dtype) @ v).transpose(2, 3).reshape(n, -1, h, w)
        return x + self.out(found)
