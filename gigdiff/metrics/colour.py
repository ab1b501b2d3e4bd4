"""Colour features of a product photo: soft CIELAB histograms of what isn't white background.

An ImageNet network is trained to look past colour, so the colour probe reads these beside its features.
"""

from __future__ import annotations

import numpy as np
import torch

from gigdiff.metrics.features import check_images, resize_antialiased

__all__ = ["ColourHistogram", "centre_weights", "foreground_weights", "srgb_to_lab"]

# Bin centres, closer together near grey, where colour names part within a few units.
L_CENTRES = (5.0, 20.0, 36.0, 52.0, 68.0, 84.0, 97.0)
A_CENTRES = (-45.0, -22.0, -10.0, -3.0, 3.0, 10.0, 22.0, 40.0, 65.0)
B_CENTRES = (-55.0, -32.0, -16.0, -6.0, 0.0, 6.0, 16.0, 34.0, 62.0)


def srgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """sRGB (..., 3) in [0, 255] -> CIELAB (..., 3) under D65, 2 degree observer (IEC 61966-2-1, CIE 15)."""
    c = rgb / 255.0
    linear = torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055).clamp_min(0.0) ** 2.4)
    matrix = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=rgb.dtype,
    )
    xyz = linear @ (matrix / matrix.sum(dim=1, keepdim=True)).T  # divided by the white point, so white is (1, 1, 1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-9) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def foreground_weights(lab: torch.Tensor) -> torch.Tensor:
    """How surely a pixel is product and not white ground: Lab (..., 3) -> 1 - exp(-(dE / 10)^2), dE CIE76 to white."""
    white = torch.tensor([100.0, 0.0, 0.0])
    return 1.0 - torch.exp(-((lab - white).pow(2).sum(-1)) / 10.0**2)


def centre_weights(height: int, width: int) -> torch.Tensor:
    """A Gaussian around the image's centre, where the product is: (1, height * width), at most 1."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.exp(-((y[:, None] / 0.6) ** 2 + (x[None, :] / 0.6) ** 2)).reshape(1, -1)


class ColourHistogram:
    """Two soft Lab histograms (square roots, so that rare colours count) and the share of foreground.

    Pixels count by `foreground_weights`, in the second histogram also by `centre_weights`. Each pixel is shared among
    the eight nearest bins.
    """

    name = "lab-histogram-40x32"
    dim = 2 * len(L_CENTRES) * len(A_CENTRES) * len(B_CENTRES) + 1
    resize = "antialiased bicubic, float32, to 40 x 32 (height x width), clamped to 0-255"
    size = (40, 32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, 1135)."""
        check_images(images)
        with torch.inference_mode():
            parts = [self._batch(images[i : i + 256]) for i in range(0, len(images), 256)]
        return torch.cat(parts).numpy()

    def _batch(self, images: np.ndarray) -> torch.Tensor:
        n, (height, width) = len(images), self.size
        lab = srgb_to_lab(resize_antialiased(images, height, width).permute(0, 2, 3, 1).reshape(n, -1, 3))
        foreground, centre = foreground_weights(lab), centre_weights(height, width)
        histograms = [self._histogram(lab, weight) for weight in (foreground, foreground * centre)]
        return torch.cat([*histograms, foreground.mean(dim=1, keepdim=True)], dim=1)

    @staticmethod
    def _histogram(lab: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Lab (N, P, 3) and weights (N, P) -> square roots of the normalised histogram (N, bins)."""
        index = torch.zeros(*lab.shape[:2], 1, dtype=torch.int64)
        share = weight[..., None] / (weight.sum(dim=1) + 1e-3)[:, None, None]
        for axis, centres in enumerate((L_CENTRES, A_CENTRES, B_CENTRES)):
            c = torch.tensor(centres)
            value = lab[..., axis].clamp(centres[0], centres[-1]).contiguous()
            low = torch.searchsorted(c, value, right=True).sub_(1).clamp_(0, len(centres) - 2)
            t = (value - c[low]) / (c[low + 1] - c[low])
            index = (index[..., None] * len(centres) + torch.stack([low, low + 1], dim=-1)[..., None, :]).flatten(-2)
            share = (share[..., None] * torch.stack([1 - t, t], dim=-1)[..., None, :]).flatten(-2)
        bins = len(L_CENTRES) * len(A_CENTRES) * len(B_CENTRES)
        out = torch.zeros(len(lab), bins)
        out.scatter_add_(1, index.flatten(1), share.flatten(1))
        return out.sqrt_()
