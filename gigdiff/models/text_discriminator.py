"""The discriminator of the GAN and of the VAE-GAN: is this a product photo, and is it one of what the text says?"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigdiff.models.autoencoder import ResidualBlock
from gigdiff.models.conditioning import TextSummary
from gigdiff.models.gan import coarsest_grid

__all__ = ["Judgement", "TextDiscriminator"]


class Judgement(NamedTuple):
    """Scores of k groups of N images, each group's image i with text i.

    Attributes:
        scores: (k, N). mismatched: (N,), the first group's images with their neighbours' texts (text i - 1).
        similarity: (N, N), the first group's image i against text j, a scaled cosine; for the contrastive loss.
    """

    scores: Tensor
    mismatched: Tensor
    similarity: Tensor


class TextDiscriminator(nn.Module):
    """A projection discriminator (Miyato and Koyama 2018, arXiv 1802.05637): D(x, t) = r(x) + <m(f(x)), s(t)>.

    r(x) judges the whole, u(f(x)), and every position of every level, the mean of u_l(x_p): a vector for the whole
    image has no room to say which of its patches does not fit its neighbours.

    Text enters after all convolutions, so an image's scores with other texts cost a product of vectors: mismatched
    captions as extra fakes (Reed et al. 2016, arXiv 1605.05396) need no further pass. No norms and nothing else that
    ties the images of a batch together, which gradient penalties would feel.

    Args:
        channels, height, width, fold: of the images, as the generator's.
        widths, blocks: as the generator's, coarsest level first.
        text_dim: numbers a token. embed_dim: of the space that images and texts meet in.
    """

    def __init__(
        self,
        channels: int = 16,
        height: int = 10,
        width: int = 8,
        fold: int = 1,
        widths: tuple[int, ...] = (256, 192),
        blocks: tuple[int, ...] = (2, 1),
        text_dim: int = 384,
        embed_dim: int = 256,
    ) -> None:
        super().__init__()
        self.fold = fold
        rows, columns = coarsest_grid(height, width, fold, widths, blocks)
        self.conv_in = nn.Conv2d(channels * fold**2, widths[-1], 3, padding=1)
        fine_to_coarse = list(zip(widths, blocks, strict=True))[::-1]
        self.levels = nn.ModuleList(nn.Sequential(*(ResidualBlock(c) for _ in range(b))) for c, b in fine_to_coarse)
        pairs = itertools.pairwise(fine_to_coarse)
        self.downs = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for (fine, _), (coarse, _) in pairs)
        self.embed = nn.Linear(widths[0] * rows * columns, embed_dim)
        self.realism = nn.Linear(embed_dim, 1)
        self.patches = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(c, 64, 1), nn.SiLU(), nn.Conv2d(64, 1, 1)) for c, _ in fine_to_coarse
        )
        self.match = nn.Linear(embed_dim, embed_dim)
        self.contrast = nn.Linear(embed_dim, embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.text = TextSummary(text_dim, embed_dim)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, channels, height, width) -> of the whole (N, embed_dim), and what the patches score (N,)."""
        scores = []
        x = F.pixel_unshuffle(images, self.fold).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        for i, level in enumerate(self.levels):
            if i > 0:
                x = self.downs[i - 1](F.pixel_unshuffle(x, 2))
            x = level(x)
            scores.append(self.patches[i](x).float().mean((1, 2, 3)))
        return F.silu(self.embed(F.silu(x).flatten(1))), torch.stack(scores).sum(0)

    def forward(self, images: Tensor, condition: Tensor) -> Judgement:
        """images (k N, ...), group after group; condition (N, 1 + L, text_dim)."""
        n = len(condition)
        found, patches = self.features(images)
        found, text = found.float(), self.text(condition).float()
        # In float32: a score rounded to bfloat16 has steps of 0.02, as large as the differences that penalties take.
        with torch.autocast(images.device.type, enabled=False):
            realism = self.realism(found).view(-1, n) + patches.view(-1, n)
            match = self.match(found).view(-1, *text.shape) * text.shape[-1] ** -0.5
            scores = realism + (match * text).sum(-1)
            mismatched = realism[0] + (match[0] * text.roll(1, 0)).sum(-1)
            image_side = F.normalize(self.contrast(found[:n]), dim=-1)
            similarity = image_side @ F.normalize(text, dim=-1).T * self.log_scale.exp().clamp(max=30.0)
        return Judgement(scores, mismatched, similarity)
