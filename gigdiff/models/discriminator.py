"""Discriminators of pictures and their losses, for sharpening an autoencoder's decoder or an upscaler."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigdiff.metrics.efficientnet import PERCEPTUAL_STAGES, EfficientNetLite
from gigdiff.models.perceptual import resized, stage_maps

__all__ = [
    "FeatureDiscriminator",
    "PatchDiscriminator",
    "build_discriminator",
    "discriminator_loss",
    "generator_loss",
]


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


class FeatureDiscriminator(nn.Module):
    """(N, 3, H, W) -> logits (N, 1, H/16, W/16) of the enlarged picture, read off a pretrained network's features.

    A discriminator that starts from pixels has to learn to see first; on frozen features small heads judge from the
    start (Projected GANs, Sauer et al. 2021, arXiv 2111.01007). One head a stage, at 1/2 to 1/16 of the resolution;
    their logits are averaged over 16 x 16 patches and then over the stages.

    Args:
        net: from `load_efficientnet("lite2")`; constant, and no part of `parameters()` or `state_dict()`.
        size: factor that pictures are enlarged by first, see `perceptual_loss`.
        width: channels of the heads.
    """

    def __init__(self, net: EfficientNetLite, size: float = 1, width: int = 64) -> None:
        super().__init__()
        self._frozen = (net,)  # in a tuple: torch would make it a part of this module
        self.size = size
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for channels in net.channels(PERCEPTUAL_STAGES)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = stage_maps(self._frozen[0], resized(x, self.size))
        # Unit vectors have small entries; times the root of their length they are of the heads' usual size.
        logits = [head(h * h.shape[1] ** 0.5) for head, h in zip(self.heads, maps, strict=True)]
        patches = logits[-1].shape[-2:]
        return torch.stack([F.adaptive_avg_pool2d(one, patches) for one in logits]).mean(0)


def build_discriminator(kind: str, net: EfficientNetLite | None, width: int = 64) -> nn.Module:
    """A trainer's `--discriminator`: "features", on `net` (None: not loaded, as nothing is adversarial), or "patch"."""
    if kind == "features" and net is not None:
        return FeatureDiscriminator(net, width=width)
    return PatchDiscriminator(width)


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
