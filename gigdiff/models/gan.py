"""Generators: noise and text -> latents or pixels, in one pass.

Both work on a grid that doubles in size from level to level (5 x 4, then 10 x 8 for latents of 80 x 64 pixels), have no
normalisation layers, and hear text twice: summed up in a vector, and token by token through attention. Both take one
flat vector of Gaussian numbers an image, so that who draws needs to know nothing but its length.

`ConvGenerator` is the plain one: noise and text make the coarsest grid, convolutions do the rest. `StyleGenerator` is
built on the ideas of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958): a mapping network makes a style of noise and
text, every convolution is modulated by it, and each adds noise of its own for what is left to chance.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gigdiff.errors import InputError
from gigdiff.models.autoencoder import ResidualBlock
from gigdiff.models.conditioning import TextSummary, TokenAttention

__all__ = ["ConvGenerator", "ModulatedConv", "StyleGenerator", "coarsest_grid", "doubled"]


def coarsest_grid(height: int, width: int, fold: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> list[int]:
    """[rows, columns] of the first level, checked: `height` x `width` is folded once and halved between levels.

    Raises:
        InputError: the size can't be halved so often, or widths and blocks are of different length.
    """
    if not widths or len(widths) != len(blocks):
        raise InputError(
            f"widths {tuple(widths)} and blocks {tuple(blocks)}: one of each a level is needed, at least one level"
        )
    divisor = fold * 2 ** (len(widths) - 1)
    if height % divisor or width % divisor:
        raise InputError(
            f"{height} x {width} can't be folded by {fold} and halved {len(widths) - 1} times; it must be a multiple "
            f"of {divisor} both ways: give fewer widths or another --height and --width"
        )
    return [height // divisor, width // divisor]


def doubled(x: Tensor) -> Tensor:
    """Twice the size, interpolated: smooth until the finer level's convolutions make it otherwise.

    Channels folded out into space have weights of their own for each corner, and a generator of latents, each of which
    is a patch of pixels, is long in learning that neighbours belong together: it drew chequerboards of patches.
    """
    return F.interpolate(x, scale_factor=2, mode="bilinear")


class ModulatedConv(nn.Module):
    """A 3x3 convolution whose weights are scaled per image by its style, then brought to unit length (demodulation).

    With s = affine(style) and w' = w_oik s_i, the weights of image n are w' / sqrt(sum_ik w'^2 + eps) (arXiv
    1912.04958, equations 1 and 3). Scaling inputs before and outputs after one shared convolution is the same and
    needs no weights for each image: that would be a grouped convolution, which CPUs are slow at.

    x (N, in, H, W), style (N, style_dim) -> (N, out, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, style_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = nn.Linear(style_dim, in_channels)
        nn.init.normal_(self.affine.weight, std=style_dim**-0.5)
        nn.init.ones_(self.affine.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = self.affine(style)
        lengths = (scale.square() @ self.weight.square().sum((2, 3)).T + 1e-8).rsqrt()
        y = F.conv2d(x * scale[..., None, None], self.weight, padding=1)
        return y * lengths[..., None, None] + self.bias[:, None, None]


class StyleBlock(nn.Module):
    """x + gain * conv(silu(conv(silu(x)))), modulated, with learned amounts of noise after each convolution.

    A demodulated branch has unit variance whatever its weights, so it is the gain that starts small, not the weights.
    noise (N, 2, H, W).
    """

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv1 = ModulatedConv(channels, channels, style_dim)
        self.conv2 = ModulatedConv(channels, channels, style_dim)
        self.noise_strength = nn.Parameter(torch.full((2, channels), 0.1))
        self.gain = nn.Parameter(torch.full((channels,), 0.2))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        strength = self.noise_strength[..., None, None]
        h = self.conv1(F.silu(x), style) + strength[0] * noise[:, :1]
        h = self.conv2(F.silu(h), style) + strength[1] * noise[:, 1:]
        return x + self.gain[:, None, None] * h


class StyleGenerator(ModelMixin, ConfigMixin):
    """Noise (N, noise_size) and condition (N, 1 + L, text_dim) -> (N, channels, height, width), by styles.

    Args:
        channels: of what is drawn: the autoencoder's latent channels, or 3.
        height, width: of what is drawn: 10 x 8 latents, or 80 x 64 pixels.
        fold: work on `fold` x `fold` patches folded into channels: 1 for latents, 4 for pixels.
        widths: channels of each level, coarsest first.
        blocks: residual blocks of each level.
        text_dim: numbers a token. noise_dim: numbers of the mapping network's noise. style_dim: of a style.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        height: int = 10,
        width: int = 8,
        fold: int = 1,
        widths: tuple[int, ...] = (320, 192),
        blocks: tuple[int, ...] = (2, 2),
        text_dim: int = 384,
        noise_dim: int = 128,
        style_dim: int = 256,
    ) -> None:
        super().__init__()
        self.grid = coarsest_grid(height, width, fold, widths, blocks)
        self.text = TextSummary(text_dim, style_dim)
        self.mapping = nn.Sequential(
            nn.Linear(noise_dim + style_dim, style_dim), nn.SiLU(),
            nn.Linear(style_dim, style_dim), nn.SiLU(),
            nn.Linear(style_dim, style_dim), nn.SiLU(),
        )  # fmt: skip
        # He et al. 2015 (arXiv 1502.01852): with torch's own, smaller weights a style hardly depends on its noise, and
        # the generator settles on one picture a prompt before it has found out what the noise is for.
        for layer in self.mapping:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.start = nn.Linear(style_dim, widths[0] * self.grid[0] * self.grid[1])
        self.attentions = nn.ModuleList(TokenAttention(c, text_dim) for c in widths)
        self.levels = nn.ModuleList(
            nn.ModuleList(StyleBlock(c, style_dim) for _ in range(b)) for c, b in zip(widths, blocks, strict=True)
        )
        self.ups = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], channels * fold**2, 3, padding=1)
        # What truncation is towards: the mean style of a text over these draws.
        typical = torch.randn(64, noise_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("typical_noise", typical)
        self.typical_noise: Tensor

    @property
    def noise_size(self) -> int:
        """Gaussian numbers an image takes: the mapping network's, and two planes a block."""
        rows, columns = self.grid
        planes = sum(2 * len(level) * rows * columns * 4**i for i, level in enumerate(self.levels))  # type: ignore[arg-type]
        return self.config["noise_dim"] + planes

    def style(self, noise: Tensor, condition: Tensor, truncation: float = 1.0) -> Tensor:
        """Noise (N, noise_dim), condition -> styles (N, style_dim).

        truncation psi < 1 draws them towards the mean style of *their own text*, w_mean + psi (w - w_mean)
        (arXiv 1812.04948, section 2, made conditional): less variety, fewer failures.
        """
        text = self.text(condition)
        noise = noise * noise.square().mean(1, keepdim=True).add(1e-8).rsqrt()
        style = self.mapping(torch.cat([noise, text], 1))
        if truncation == 1.0:
            return style
        typical = self.typical_noise * self.typical_noise.square().mean(1, keepdim=True).rsqrt()
        means = [self.mapping(torch.cat([typical, one.expand(len(typical), -1)], 1)).mean(0) for one in text]
        mean = torch.stack(means)
        return mean + truncation * (style - mean)

    def forward(self, noise: Tensor, condition: Tensor, truncation: float = 1.0) -> Tensor:
        z, rest = noise.split([self.config["noise_dim"], noise.shape[1] - self.config["noise_dim"]], 1)
        style = self.style(z, condition, truncation)
        x = self.start(style).unflatten(1, (-1, *self.grid)).contiguous(memory_format=torch.channels_last)
        for i, (attention, level) in enumerate(zip(self.attentions, self.levels, strict=True)):
            if i > 0:
                x = doubled(self.ups[i - 1](F.silu(x)))
            x = attention(x, condition)
            for block in level:  # type: ignore[union-attr,attr-defined]
                planes, rest = rest.split([2 * x.shape[2] * x.shape[3], rest.shape[1] - 2 * x.shape[2] * x.shape[3]], 1)
                x = block(x, style, planes.view(len(x), 2, *x.shape[2:]))
        return F.pixel_shuffle(self.conv_out(F.silu(x)), self.config["fold"])


class ConvGenerator(ModelMixin, ConfigMixin):
    """Noise (N, noise_size) and condition (N, 1 + L, text_dim) -> (N, channels, height, width), by convolutions.

    In the manner of DCGAN (Radford et al. 2016, arXiv 1511.06434), with residual blocks that start at zero in place of
    batch norms. Arguments as StyleGenerator's; `style_dim` is the text summary's width.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        height: int = 10,
        width: int = 8,
        fold: int = 1,
        widths: tuple[int, ...] = (320, 192),
        blocks: tuple[int, ...] = (2, 2),
        text_dim: int = 384,
        noise_dim: int = 128,
        style_dim: int = 256,
    ) -> None:
        super().__init__()
        self.grid = coarsest_grid(height, width, fold, widths, blocks)
        self.text = TextSummary(text_dim, style_dim)
        self.start = nn.Linear(noise_dim + style_dim, widths[0] * self.grid[0] * self.grid[1])
        self.attentions = nn.ModuleList(TokenAttention(c, text_dim) for c in widths)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(c) for _ in range(b))) for c, b in zip(widths, blocks, strict=True)
        )
        self.ups = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], channels * fold**2, 3, padding=1)

    @property
    def noise_size(self) -> int:
        return self.config["noise_dim"]

    def forward(self, noise: Tensor, condition: Tensor, truncation: float = 1.0) -> Tensor:
        """truncation psi scales the noise: at 0 every image of a prompt is the same."""
        x = self.start(torch.cat([truncation * noise, self.text(condition)], 1)).unflatten(1, (-1, *self.grid))
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (attention, level) in enumerate(zip(self.attentions, self.levels, strict=True)):
            if i > 0:
                x = doubled(self.ups[i - 1](F.silu(x)))
            x = level(attention(x, condition))
        return F.pixel_shuffle(self.conv_out(F.silu(x)), self.config["fold"])
