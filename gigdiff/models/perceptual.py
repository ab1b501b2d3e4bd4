"""A perceptual loss on a pretrained network that is not the one the results are measured with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gigdiff.metrics.efficientnet import EfficientNetLite, unit_lengths, unit_maps

__all__ = ["feature_losses", "perceptual_loss", "resized", "stage_maps"]


def perceptual_loss(net: EfficientNetLite, real: Tensor, fake: Tensor, sizes: tuple[float, ...]) -> Tensor:
    """Distance of two batches' feature maps, averaged over stages and sizes.

    In the manner of LPIPS (Zhang et al., arXiv 1801.03924, eq. 1) with all channel weights 1: each position's features
    are normalised to unit length, so a stage's term is between 0 and 4.

    Args:
        net: from `load_efficientnet("lite2")`; lite0 is what gigdiff measures with.
        real: (N, 3, H, W) in [-1, 1]; constants.
        fake: the same shape; gradients reach it.
        sizes: factors that the pictures are enlarged by first. The network was trained on whole photos of 260 pixels:
            small pictures want enlarging, and a second size makes other structures count.
    """
    return torch.stack([term for size in sizes for term in _terms(net, real, fake, size)]).mean()


def feature_losses(
    net: EfficientNetLite, real: Tensor, fake: Tensor, sizes: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """`perceptual_loss`, and the relative squared error of the pooled features, |a - b|^2 / |a|^2, batch mean.

    The first asks that every place looks alike; the second, measured at the first of `sizes`, that the whole is taken
    for the same thing. It is the kind of vector that Fréchet distances and probes are measured on, of another network.
    One pass of the network gives both.
    """
    with torch.no_grad():
        pooled, constants = net.features(_normalised(resized(real, sizes[0])))
    moved, maps = net.features(_normalised(resized(fake, sizes[0])))
    same = ((moved - pooled).square().sum(1) / pooled.square().sum(1).clamp(min=1e-6)).mean()
    terms = _distances(unit_lengths(constants), unit_lengths(maps))
    terms += [term for size in sizes[1:] for term in _terms(net, real, fake, size)]
    return torch.stack(terms).mean(), same


def _terms(net: EfficientNetLite, real: Tensor, fake: Tensor, size: float) -> list[Tensor]:
    """The stages' distances at one size."""
    with torch.no_grad():
        constants = stage_maps(net, resized(real, size))
    return _distances(constants, stage_maps(net, resized(fake, size)))


def _distances(real: list[Tensor], fake: list[Tensor]) -> list[Tensor]:
    return [(a - b).square().sum(1).mean() for a, b in zip(real, fake, strict=True)]


def resized(images: Tensor, factor: float) -> Tensor:
    """Images (N, 3, H, W) `factor` times as high and wide."""
    if factor == 1:
        return images
    return F.interpolate(images, scale_factor=factor, mode="area" if factor < 1 else "bilinear")


def stage_maps(net: EfficientNetLite, images: Tensor) -> list[Tensor]:
    """The stages' maps of images (N, 3, H, W) in [-1, 1], at 1/2 to 1/16 of their size, of unit length a position."""
    return unit_maps(net, _normalised(images))


def _normalised(images: Tensor) -> Tensor:
    """From [-1, 1] to the networks' own (v - 127) / 128 of a pixel v in [0, 255]."""
    return ((images * 127.5 + 0.5) / 128.0).contiguous(memory_format=torch.channels_last)
