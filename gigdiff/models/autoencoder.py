"""The autoencoder of the embedded models: 8x8 pixels become one latent position.

Three choices make it fast on a CPU and good after an hour of training:

* Pixels are folded into channels before any work is done (space-to-depth), so no convolution runs at full resolution.
* No normalisation layers: their backward pass cost a quarter of a training step at these sizes. Residual branches start
  at zero instead (Zhang et al. 2019, "Fixup Initialization", arXiv 1901.09321), so the network starts as its skips.
* A linear skip runs through the whole codec. Initialised from the principal components of 8x8 patches
  (`init_linear_from_patches`) it *is* the best linear codec before the first step; the network learns the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gigdiff.errors import ModelMismatchError, ModelNotFoundError
from gigdiff.models.widen import copy_leading

__all__ = ["FixedVarianceGaussian", "ProductAutoencoder", "load_autoencoder", "visibility"]

FACTOR = 8  # pixels per latent position, each way


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starting at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Encoder(nn.Module):
    """(N, 3, H, W) -> (N, latent_channels, H/8, W/8), before normalisation."""

    def __init__(self, latent_channels: int, quarter: int, eighth: int, blocks: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3 * FACTOR**2, latent_channels, 1)
        self.conv_in = nn.Conv2d(3 * 16, quarter, 3, padding=1)
        self.at_quarter = nn.Sequential(*(ResidualBlock(quarter) for _ in range(blocks)))
        self.down = nn.Conv2d(quarter * 4, eighth, 1)
        self.at_eighth = nn.Sequential(*(ResidualBlock(eighth) for _ in range(blocks)))
        self.conv_out = nn.Conv2d(eighth, latent_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        skip = self.linear(F.pixel_unshuffle(x, FACTOR))
        h = self.at_quarter(self.conv_in(F.pixel_unshuffle(x, 4)))
        h = self.at_eighth(self.down(F.pixel_unshuffle(h, 2)))
        return skip + self.conv_out(F.silu(h))


class Decoder(nn.Module):
    """(N, latent_channels, H/8, W/8) -> (N, 3, H, W). The last blocks run at half resolution, where edges are made."""

    def __init__(self, latent_channels: int, half: int, quarter: int, eighth: int, blocks: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(latent_channels, 3 * FACTOR**2, 1)
        self.conv_in = nn.Conv2d(latent_channels, eighth, 3, padding=1)
        self.at_eighth = nn.Sequential(*(ResidualBlock(eighth) for _ in range(blocks)))
        self.up1 = nn.Conv2d(eighth, quarter * 4, 1)
        self.at_quarter = nn.Sequential(*(ResidualBlock(quarter) for _ in range(blocks)))
        self.up2 = nn.Conv2d(quarter, half * 4, 1)
        self.at_half = ResidualBlock(half)
        self.conv_out = nn.Conv2d(half, 3 * 4, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        skip = F.pixel_shuffle(self.linear(z), FACTOR)
        h = self.at_quarter(F.pixel_shuffle(self.up1(self.at_eighth(self.conv_in(z))), 2))
        h = self.at_half(F.pixel_shuffle(self.up2(h), 2))
        return skip + F.pixel_shuffle(self.conv_out(F.silu(h)), 2)


class FixedVarianceGaussian:
    """The posterior N(mean, std^2): `sample` and `mode` as diffusers' posteriors have them."""

    def __init__(self, mean: Tensor, std: float) -> None:
        self.mean, self.std = mean, std

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean


class ProductAutoencoder(ModelMixin, ConfigMixin):
    """Pixels in [-1, 1] to unit-variance latents and back, with the interface of diffusers' AutoencoderKL.

    The posterior has a fixed standard deviation, so what training adds as noise is what the decoder learns to forgive.
    `latents_mean` and `latents_std` are set by `set_latent_statistics` once training ends; `encode` subtracts and
    divides, `decode` undoes it, and `scaling_factor` is therefore 1.

    Args:
        latent_channels: channels of a latent position.
        half_channels, quarter_channels, eighth_channels: widths at 1/2 (decoder only), 1/4 and 1/8 of the resolution.
        encoder_blocks, decoder_blocks: residual blocks at each of 1/4 and 1/8.
        posterior_std: standard deviation of the noise on raw latents during training.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        half_channels: int = 48,
        quarter_channels: int = 160,
        eighth_channels: int = 320,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        posterior_std: float = 0.05,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (48, 160, 160, 320),  # what diffusers derives the factor 8 from
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(latent_channels, quarter_channels, eighth_channels, encoder_blocks)
        self.decoder = Decoder(latent_channels, half_channels, quarter_channels, eighth_channels, decoder_blocks)
        self.register_buffer("latents_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latents_std", torch.ones(1, latent_channels, 1, 1))
        self.latents_mean: Tensor
        self.latents_std: Tensor

    @torch.no_grad()
    def init_linear_from_patches(self, images: Tensor, exponent: float = 0.5) -> None:
        """Set the linear skips from the principal components of 8x8 patches of `images` (N, 3, H, W) in [-1, 1].

        With eigenvalues l_i and eigenvectors v_i of the patch covariance, channel i of the latent is
        (v_i . (patch - mean)) * l_i^(-exponent/2) / c, and the decoder's skip is the exact inverse. exponent 0 keeps
        the pixels' own variances, 1 whitens; between, fine detail is neither drowned nor blown up to the weight of
        shape. c makes the mean channel variance 1.
        """
        patches = F.pixel_unshuffle(images.float(), FACTOR).permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
        channels = self.config["latent_channels"]
        values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
        scale = values.clamp(min=1e-12) ** (-exponent / 2)
        scale = scale / (values * scale**2).mean().sqrt()
        to_latent, to_pixels = (vectors * scale).T, vectors / scale
        encoder, decoder = self.encoder.linear, self.decoder.linear
        encoder.weight.copy_(to_latent[:, :, None, None])
        encoder.bias.copy_(-(to_latent @ mean))  # type: ignore[union-attr]
        decoder.weight.copy_(to_pixels[:, :, None, None])
        decoder.bias.copy_(mean)  # type: ignore[union-attr]

    @torch.no_grad()
    def start_from(self, other: ProductAutoencoder) -> None:
        """Take over `other`'s weights and statistics; it may have fewer latent channels.

        Channels that `other` lacks keep this model's linear code (`init_linear_from_patches`), and the decoder begins
        by ignoring them: reconstructions are `other`'s at first, with something in the new channels to learn from.

        Raises:
            ModelMismatchError: `other` has other layers, or is wider somewhere.
        """
        known = other.config["latent_channels"]
        linear = self.encoder.linear
        weight, bias = linear.weight[known:].clone(), linear.bias[known:].clone()  # type: ignore[index]
        copy_leading(other, self)
        linear.weight[known:], linear.bias[known:] = weight, bias  # type: ignore[index]
        self.latents_mean[:, :known].copy_(other.latents_mean)
        self.latents_std[:, :known].copy_(other.latents_std)

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Per-channel mean and standard deviation (latent_channels,) of raw latents over training images."""
        self.latents_mean.copy_(mean.view(1, -1, 1, 1))
        self.latents_std.copy_(std.view(1, -1, 1, 1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[FixedVarianceGaussian]:
        """(N, 3, H, W) in [-1, 1], H and W multiples of 8 -> posterior over latents (N, C, H/8, W/8)."""
        mean = (self.encoder(x) - self.latents_mean) / self.latents_std
        posterior = FixedVarianceGaussian(mean, self.config["posterior_std"] / float(self.latents_std.mean()))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)  # type: ignore[arg-type]

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> dict[str, Tensor] | tuple[Tensor]:
        """Latents (N, C, h, w) -> pixels (N, 3, 8h, 8w), nominally in [-1, 1] (not clamped)."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        sample = self.decoder(z * self.latents_std + self.latents_mean)
        return DecoderOutput(sample=sample) if return_dict else (sample,)  # type: ignore[return-value]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction and raw latents, for training: `noise` is standard normal, of the latents' shape."""
        raw = self.encoder(x)
        return self.decoder(raw if noise is None else raw + self.config["posterior_std"] * noise), raw


def load_autoencoder(folder: str | Path, **changes: Any) -> ProductAutoencoder:
    """The autoencoder that training/train_autoencoder.py saved in `folder`, with config values changed by `changes`.

    Raises:
        ModelNotFoundError: there is none. ModelMismatchError: the folder holds another model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"no autoencoder in {folder}: give the autoencoder/ folder of a run of training/train_autoencoder.py"
        )
    try:
        return ProductAutoencoder.from_pretrained(folder, use_safetensors=True, **changes)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelMismatchError(f"{folder} does not load as a ProductAutoencoder: {str(error)[:300]}") from error


@torch.no_grad()
def visibility(vae: ProductAutoencoder, latents: Tensor, size: float = 0.2) -> Tensor:
    """How much a change of each latent channel shows in the pixels: (1, C, 1, 1), of unit mean square.

    Root mean square of the pixels' change where one channel gets noise of standard deviation `size`. Latent channels
    all have unit variance, but brightness shows six times as much as the rest of them do on average: held as one
    among equals, it is drawn as a mosaic of patches that don't go together.

    Args:
        latents: (N, C, h, w), of photos.
    """
    generator = torch.Generator().manual_seed(0)
    noise = size * torch.randn(latents[:, :1].shape, generator=generator).to(latents.device)
    clean = vae.decode(latents).sample  # type: ignore[union-attr]
    shown = []
    for channel in range(latents.shape[1]):
        changed = latents.clone()
        changed[:, channel : channel + 1] += noise
        shown.append((vae.decode(changed).sample - clean).square().mean())  # type: ignore[union-attr]
    energy = torch.stack(shown)
    return (energy / energy.mean()).sqrt().view(1, -1, 1, 1)
