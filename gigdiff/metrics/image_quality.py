"""How close a reconstruction is to its original, image by image: PSNR, SSIM, a perceptual distance, edge sharpness.

Every function takes two uint8 arrays (N, H, W, 3), originals first, and returns float64 (N,).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from gigdiff.errors import InputError
from gigdiff.metrics.efficientnet import load_efficientnet, unit_maps
from gigdiff.metrics.features import check_images, resize_antialiased

__all__ = [
    "PERCEPTUAL_NAME",
    "edge_contrast",
    "image_quality",
    "perceptual_distance",
    "psnr",
    "sharpness_ratio",
    "ssim",
]

PERCEPTUAL_NAME = "efficientnet-lite0 perceptual distance (160x128)"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what JPEG and Pillow call grey


def psnr(originals: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB over all pixels and channels, 10 log10(255^2 / MSE); infinite where equal."""
    _check_pair(originals, others)
    error = ((originals.astype(np.float64) - others.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(255.0**2 / error)


def ssim(originals: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity, in [-1, 1], 1 = equal (Wang et al. 2004), averaged over the three channels.

    The paper's setting: an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, mean over
    the positions where the whole window lies inside. Equal to scikit-image's structural_similarity with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, data_range=255.
    """
    _check_pair(originals, others)
    if min(originals.shape[1:3]) < 11:
        raise InputError(f"SSIM needs images of at least 11 x 11 pixels, {originals.shape[1:3]} given")
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5.0) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    down, right = window.view(1, 1, -1, 1), window.view(1, 1, 1, -1)

    def blur(x: torch.Tensor) -> torch.Tensor:  # (N, 3, H, W) -> (N * 3, 1, H - 10, W - 10)
        return F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], down), right)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    out = []
    for start in range(0, len(originals), 64):
        x = torch.from_numpy(originals[start : start + 64]).permute(0, 3, 1, 2).double()
        y = torch.from_numpy(others[start : start + 64]).permute(0, 3, 1, 2).double()
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        value = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        out.append(value.view(len(x), -1).mean(dim=1).numpy())
    return np.concatenate(out)


def perceptual_distance(originals: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance between the two images' EfficientNet-Lite0 feature maps, at least 0, 0 = equal. Not LPIPS.

    In the manner of LPIPS (Zhang et al., arXiv 1801.03924, eq. 1) with all channel weights 1: after the stages at 1/2,
    1/4, 1/8 and 1/16 of the resolution, both maps are normalised to unit length across channels, their squared
    difference is summed over channels and averaged over positions, and the four stages are averaged. The images are
    resized as for the features, to 160 x 128. Only compare it with itself: no human judged these weights.
    """
    _check_pair(originals, others)
    net = load_efficientnet()
    out = []
    with torch.inference_mode():
        for start in range(0, len(originals), 32):
            pair = np.concatenate([originals[start : start + 32], others[start : start + 32]])
            x = (resize_antialiased(pair, 160, 128) - 127.0) / 128.0
            total = torch.zeros(len(pair) // 2, dtype=torch.float64)
            for unit in unit_maps(net, x):
                a, b = unit.chunk(2)
                total += (a - b).pow(2).sum(dim=1).mean(dim=(1, 2)).double()
            out.append((total / 4.0).numpy())
    return np.concatenate(out)


def sharpness_ratio(originals: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Energy of the luma's Laplacian in the other image over that in the original: below 1 softer, above 1 harsher.

    sum |lap(other)|^2 / sum |lap(original)|^2 with the 3 x 3 Laplacian (4 in the middle, -1 beside), borders left out.
    Noise raises it too, so read it beside PSNR. NaN where the original has no edge at all.
    """
    _check_pair(originals, others)

    def energy(images: np.ndarray) -> np.ndarray:
        y = images.astype(np.float64) @ np.asarray(LUMA)
        lap = 4 * y[:, 1:-1, 1:-1] - y[:, :-2, 1:-1] - y[:, 2:, 1:-1] - y[:, 1:-1, :-2] - y[:, 1:-1, 2:]
        return (lap**2).sum(axis=(1, 2))

    with np.errstate(divide="ignore", invalid="ignore"):
        # Rounding in the luma's weights leaves some 1e-25 on a flat image; that is no edge.
        original = energy(originals)
        return np.where(original > 1e-6, energy(others) / original, np.nan)


def edge_contrast(originals: np.ndarray, others: np.ndarray, share: float = 0.05) -> np.ndarray:
    """How steep the other image is where the original's edges are: below 1 softer edges, above 1 harsher ones.

    sum |grad other| / sum |grad original| of the luma (central differences) over the `share` of positions where the
    original's gradient is largest: outlines, seams, prints. `sharpness_ratio` counts a JPEG's noise and the fabric's
    grain too; this one doesn't. NaN where the original is flat.
    """
    _check_pair(originals, others)

    def gradient(images: np.ndarray) -> np.ndarray:
        y = images.astype(np.float64) @ np.asarray(LUMA)
        across, down = y[:, 1:-1, 2:] - y[:, 1:-1, :-2], y[:, 2:, 1:-1] - y[:, :-2, 1:-1]
        return np.hypot(across, down).reshape(len(y), -1) / 2

    original, other = gradient(originals), gradient(others)
    count = max(1, round(share * original.shape[1]))
    edges = np.argsort(-original, axis=1, kind="stable")[:, :count]
    with np.errstate(divide="ignore", invalid="ignore"):
        there = np.take_along_axis(original, edges, 1).sum(1)
        return np.where(there > 1e-6, np.take_along_axis(other, edges, 1).sum(1) / there, np.nan)


def image_quality(originals: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """All of them, averaged over the images: {"psnr", "ssim", "perceptual", "sharpness", "edges", "count"}.

    PSNR is the mean of the images' dB values, equal images counted as 100 dB; sharpness and edge contrast are medians,
    which a few almost flat photos don't move.
    """
    return {
        "psnr": float(np.minimum(psnr(originals, others), 100.0).mean()),
        "ssim": float(ssim(originals, others).mean()),
        "perceptual": float(perceptual_distance(originals, others).mean()),
        "sharpness": float(np.nanmedian(sharpness_ratio(originals, others))),
        "edges": float(np.nanmedian(edge_contrast(originals, others))),
        "count": float(len(originals)),
    }


def _check_pair(originals: np.ndarray, others: np.ndarray) -> None:
    check_images(originals)
    check_images(others)
    if originals.shape != others.shape:
        raise InputError(f"originals are {originals.shape} and the others {others.shape}; both must have one shape")
