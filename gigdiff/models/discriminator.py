"""A patch discriminator and its losses, for sharpening an autoencoder's decoder or an upscaler."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PatchDiscriminator", "discriminator_loss", "generator_loss"]


class PatchDiscriminator(nn.Module):
    """(N, 3, H, W) -> logits (N, 1, H/8, W/8), each judging a patch (Isola et al. 2017, arXiv 1611.07004).

    Two pixels each way are folded into channels first; no norms, since they tie the images of a batch together.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(12, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
                nn.Conv2d(2 * width, 3 * width, 4, stride=2, padding=1),
                nn.Conv2d(3 * width, 3 * width, 3, padding=1),
            ]
        )
        self.out = nn.Conv2d(3 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pixel_unshuffle(x, 2)
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
        return self.out(h)


def discriminator_loss(
    net: nn.Module, real: Tensor, fake: Tensor, noise: Tensor, *, gamma: float, noise_std: float = 0.05
) -> Tensor:
    """Relativistic loss on pairs with an approximate gradient penalty on both sides.

        softplus(D(fake) - D(real)) + gamma / (2 s^2) [(D(real + s n) - D(real))^2 + (D(fake + s n) - D(fake))^2]

    The first term is RpGAN's (Jolicoeur-Martineau 2018, arXiv 1807.00734); the second tends to R1 + R2 of R3GAN
    (Huang et al. 2024, arXiv 2501.05441) as s goes to 0, without a second derivative (Lin et al. 2025, 2501.08316).

    Args:
        net: the discriminator. real, fake: (N, 3, H, W). noise: standard normal of the same shape.
        gamma: weight of the penalty. noise_std: s.
    """
    both = torch.cat([real, fake])
    logits = net(torch.cat([both, both + noise_std * torch.cat([noise, noise])])).float()
    clean, noisy = logits.chunk(2)
    on_real, on_fake = clean.chunk(2)
    penalty = (noisy - clean).square().mean() * 2 / (2 * noise_std**2)
    return F.softplus(on_fake - on_real).mean() + gamma * penalty


def generator_loss(net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """softplus(D(real) - D(fake)): each reconstruction against its own photo."""
    on_real, on_fake = net(torch.cat([real, fake])).float().chunk(2)
    return F.softplus(on_real - on_fake).mean()
