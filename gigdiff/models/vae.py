"""A conditional variational autoencoder over latents or pixels, sampled from a prior that it learns from the text.

One Gaussian vector an image gives blurred averages. Here the variables form a ladder, as in VDVAE (Child 2021, arXiv
2011.10650): the decoder goes from a coarse grid to the fine one, and each of its blocks draws a grid of variables from
a prior that depends on the text and on all that was drawn before. In training a posterior that has also seen the image
draws them; what it adds to the prior is what the KL divergence charges for.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gigdiff.errors import CapabilityError
from gigdiff.models.autoencoder import ResidualBlock
from gigdiff.models.conditioning import TextSummary, TokenAttention
from gigdiff.models.gan import coarsest_grid, doubled

__all__ = ["ConditionalVae", "VaeOutput", "calibrated_nll", "drawing_half"]


class VaeOutput(NamedTuple):
    """mean (N, channels, H, W) of p(x | z, text), and the KL divergence (N,) in nats, summed over all variables."""

    mean: Tensor
    kl: Tensor


def calibrated_nll(x: Tensor, mean: Tensor) -> Tensor:
    """Mean over images of -log N(x; mean, s^2) in nats, less the constant (1 + log 2 pi) / 2 a dimension.

    s is each channel's most likely standard deviation over the batch, its root mean squared error, which leaves the
    logarithm of that error: so no weight between reconstruction and KL needs choosing (Rybkin et al. 2021, "Simple and
    Effective VAE Training with Calibrated Decoders", arXiv 2006.13202, section 4.2). x and mean (N, C, H, W).
    """
    errors = (x - mean).square().mean((0, 2, 3)).clamp(min=1e-6)
    return 0.5 * errors.log().sum() * x[0, 0].numel()


class LadderBlock(nn.Module):
    """One rung: variables z (N, latent, H, W) are drawn, put into the stream x (N, C, H, W), and worked in.

    Prior N(m, s^2) from x; posterior N(m + s d, (s e^q)^2) from x and the encoder's features, written relative to the
    prior (Vahdat and Kautz 2020, NVAE, arXiv 2007.03898, section 3.3). Their divergence is then
    1/2 sum(d^2 + e^2q - 1) - sum(q), whatever m and s are. Both start equal. Without `posterior` it draws only.
    """

    def __init__(self, channels: int, latent: int, posterior: bool = True) -> None:
        super().__init__()
        self.prior = nn.Sequential(ResidualBlock(channels), nn.SiLU(), nn.Conv2d(channels, 2 * latent, 3, padding=1))
        heads: list[Any] = [self.prior[-1]]
        if posterior:
            self.posterior = nn.Sequential(
                nn.Conv2d(2 * channels, channels, 1), ResidualBlock(channels), nn.SiLU(),
                nn.Conv2d(channels, 2 * latent, 3, padding=1),
            )  # fmt: skip
            heads.append(self.posterior[-1])
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.enter = nn.Conv2d(latent, channels, 1)
        self.block = ResidualBlock(channels)

    def forward(self, x: Tensor, noise: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, standard normal noise, the encoder's features of this size (None: draw from the prior) -> x, KL (N,)."""
        mean, log_std = self.prior(x).float().chunk(2, 1)
        std = log_std.clamp(-5.0, 3.0).exp()
        kl = torch.zeros(len(x), device=x.device)
        if features is not None:
            shift, log_ratio = self.posterior(torch.cat([x, features], 1)).float().chunk(2, 1)
            log_ratio = log_ratio.clamp(-6.0, 2.0)
            kl = (0.5 * (shift.square() + (2 * log_ratio).exp() - 1) - log_ratio).flatten(1).sum(1)
            noise = shift + log_ratio.exp() * noise
        return self.block(x + self.enter(mean + std * noise)), kl


class ConditionalVae(ModelMixin, ConfigMixin):
    """Noise (N, noise_size) and condition (N, 1 + L, text_dim) -> VaeOutput; with an image as well, its reconstruction.

    Args:
        channels, height, width, fold: of what is drawn, as the GAN generators'.
        widths, blocks: channels and rungs of each level, coarsest first.
        latent_dim: variables a position and rung.
        text_dim: numbers a token.
        reads_images: whether it has the half that reads images, which only training needs; see `drawing_half`.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        height: int = 10,
        width: int = 8,
        fold: int = 1,
        widths: tuple[int, ...] = (256, 160),
        blocks: tuple[int, ...] = (2, 2),
        latent_dim: int = 8,
        text_dim: int = 384,
        reads_images: bool = True,
    ) -> None:
        super().__init__()
        self.grid = coarsest_grid(height, width, fold, widths, blocks)
        fine_to_coarse = list(zip(widths, blocks, strict=True))[::-1]
        if reads_images:
            self.conv_in = nn.Conv2d(channels * fold**2, widths[-1], 3, padding=1)
            self.encoder = nn.ModuleList(
                nn.Sequential(*(ResidualBlock(c) for _ in range(b))) for c, b in fine_to_coarse
            )
            pairs = itertools.pairwise(fine_to_coarse)
            self.downs = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for (fine, _), (coarse, _) in pairs)
        self.text = TextSummary(text_dim, widths[0])
        self.start = nn.Parameter(torch.randn(1, widths[0], *self.grid))
        self.attentions = nn.ModuleList(TokenAttention(c, text_dim) for c in widths)
        self.levels = nn.ModuleList(
            nn.ModuleList(LadderBlock(c, latent_dim, reads_images) for _ in range(b))
            for c, b in zip(widths, blocks, strict=True)
        )
        self.ups = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], channels * fold**2, 3, padding=1)

    @property
    def noise_size(self) -> int:
        """Gaussian numbers an image takes: one for each variable of the ladder."""
        rows, columns = self.grid
        positions = sum(len(level) * rows * columns * 4**i for i, level in enumerate(self.levels))  # type: ignore[arg-type]
        return self.config["latent_dim"] * positions

    def features(self, images: Tensor) -> list[Tensor]:
        """(N, channels, H, W) -> one feature grid a level, coarsest first."""
        x = F.pixel_unshuffle(images, self.config["fold"]).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        found: list[Tensor] = []
        for i, level in enumerate(self.encoder):
            if i > 0:
                x = self.downs[i - 1](F.pixel_unshuffle(x, 2))
            x = level(x)
            found.insert(0, x)
        return found

    def forward(
        self, noise: Tensor, condition: Tensor, truncation: float = 1.0, images: Tensor | None = None
    ) -> VaeOutput:
        """Without `images` a sample from the prior, its standard deviations scaled by `truncation`.

        Raises:
            CapabilityError: images, and this model was stored without its encoder.
        """
        if images is not None and not self.config["reads_images"]:
            raise CapabilityError(
                "this VAE was stored as its drawing half (training/package_one_pass.py) and cannot read images: take "
                "the model/ folder of the training run"
            )
        features: list[Tensor] | None = None if images is None else self.features(images)
        x = self.start + self.text(condition)[..., None, None]
        x = x.contiguous(memory_format=torch.channels_last)
        kl, rest = torch.zeros(len(noise), device=noise.device), truncation * noise
        for i, (attention, level) in enumerate(zip(self.attentions, self.levels, strict=True)):
            if i > 0:
                x = doubled(self.ups[i - 1](F.silu(x)))
            x = attention(x, condition)
            size = self.config["latent_dim"] * x.shape[2] * x.shape[3]
            for block in level:  # type: ignore[union-attr,attr-defined]
                z, rest = rest.split([size, rest.shape[1] - size], 1)
                x, cost = block(x, z.view(len(x), -1, *x.shape[2:]), None if features is None else features[i])
                kl = kl + cost
        mean = F.pixel_shuffle(self.conv_out(F.silu(x)), self.config["fold"])
        return VaeOutput(mean.float(), kl)


def drawing_half(model: ConditionalVae) -> ConditionalVae:
    """The same model without what only training needs, about half of its numbers: it draws the same images."""
    half: Any = ConditionalVae.from_config(model.config, reads_images=False)
    weights = model.state_dict()
    half.load_state_dict({name: weights[name] for name in half.state_dict()})
    return nn.Module.to(half, next(model.parameters()).dtype)  # diffusers' own `to` warns
