"""Where the product is, in a photo with a plain background; no network, a few hundredths of a second.

The background's colour is the commonest one of the frame; background is what resembles it and is connected to the
frame. So a white print inside a shirt stays product. Known limits: a product of the background's own colour (white on
white) is found by its outline or not at all, and a busy background is taken for product.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from gigdiff.colour import rgb_to_lab

__all__ = ["background_colour", "blur", "bounding_box", "product_mask"]

WORK_SIDE = 320  # pixels on the longer side at which the search is done
# CIE76 units between the background and what still is background: little where it is even, or white goods drown in it.
TOLERANCE = (2.5, 6.0)


def product_mask(pixels: np.ndarray) -> np.ndarray:
    """How much of each pixel is product: float64 (H, W) in 0 to 1, soft by about a pixel at the outline.

    Args:
        pixels: uint8 (H, W, 3).
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, WORK_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = pixels if scale == 1.0 else np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    lab = rgb_to_lab(small)
    distance = np.linalg.norm(lab - background_colour(small), axis=-1)
    frame = np.concatenate([distance[[0, -1]].ravel(), distance[:, [0, -1]].ravel()])
    uneven = np.percentile(frame[frame < TOLERANCE[1]], 95) if (frame < TOLERANCE[1]).any() else 0.0
    tolerance = float(np.clip(1.5 + 2 * uneven, *TOLERANCE))
    # JPEG leaves ripples around a product, as far from white as a white shirt is; but ripples average out.
    even_out = np.linalg.norm(blur(lab, 2) - background_colour(small), axis=-1)
    ripples = (even_out < 1.5 * tolerance) & (distance < 3 * tolerance)
    background = _connected_to_frame((distance < tolerance) | ripples)
    # A hole through which the background shows (a bag's handle) is all but exactly its colour, and even.
    even = blur((distance < 1.0).astype(np.float64), 1) > 0.99
    background |= _grown_into(even, distance < tolerance / 2)
    # At the outline a pixel is product by as much of its neighbours' contrast to the background as it has.
    rim = blur(background.astype(np.float64), 3) > 0
    mask = np.where(rim, np.clip(1.4 * distance / (_peak(distance, 2) + 1e-9), 0, 1), 1.0) * ~background
    if scale < 1.0:
        mask, distance = (
            np.asarray(Image.fromarray(a.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
            for a in (mask, distance)
        )
    # Where the search was done at a smaller size, what is background to the bit is no product.
    return np.asarray(mask * np.clip(distance, 0, 1), dtype=np.float64)


def background_colour(pixels: np.ndarray) -> np.ndarray:
    """CIELAB (3,) of the background: the median of the frame's commonest colour (in steps of 8 units)."""
    lab = rgb_to_lab(pixels)
    depth = max(1, min(pixels.shape[:2]) // 40)
    frame = np.concatenate(
        [part.reshape(-1, 3) for part in (lab[:depth], lab[-depth:], lab[:, :depth], lab[:, -depth:])]
    )
    bins, which, counts = np.unique(np.rint(frame / 8), axis=0, return_inverse=True, return_counts=True)
    # Of bins about as common the lightest: a dark trouser leg that leaves the picture is no background.
    best = max(range(len(bins)), key=lambda i: (counts[i] > 0.6 * counts.max(), bins[i][0]))
    return np.median(frame[which.ravel() == best], axis=0)


def bounding_box(mask: np.ndarray, level: float = 0.5) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of what is above `level`, right and bottom exclusive; None where nothing is."""
    rows, columns = np.flatnonzero((mask > level).any(axis=1)), np.flatnonzero((mask > level).any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def blur(values: np.ndarray, reach: int) -> np.ndarray:
    """Box mean over (2 reach + 1) squared pixels of (H, W) or (H, W, C), edges repeated."""
    size = 2 * reach + 1
    for axis in (0, 1):
        widths = [(reach + 1, reach) if a == axis else (0, 0) for a in range(values.ndim)]
        sums = np.pad(values, widths, mode="edge").cumsum(axis=axis)
        count = values.shape[axis]
        values = (np.take(sums, range(size, size + count), axis) - np.take(sums, range(count), axis)) / size
    return values


def _peak(values: np.ndarray, reach: int) -> np.ndarray:
    """The greatest value within `reach` pixels each way, (H, W)."""
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        count = values.shape[axis]
        values = np.max([np.take(padded, range(i, i + count), axis) for i in range(2 * reach + 1)], axis=0)
    return values


def _connected_to_frame(allowed: np.ndarray) -> np.ndarray:
    frame = np.zeros_like(allowed)
    frame[[0, -1]], frame[:, [0, -1]] = True, True
    return _grown_into(frame, allowed)


def _grown_into(start: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """All of `allowed` (bool (H, W)) that is connected to `start`, four ways."""
    found = start & allowed
    while True:
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        grown &= allowed
        if (grown == found).all():
            return found
        found = grown
