"""CIELAB in numpy, for edits that need no torch. (gigdiff.metrics.colour has the same in torch, for scores.)"""

from __future__ import annotations

import numpy as np

__all__ = ["lab_to_rgb", "rgb_to_lab"]

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_TO_XYZ /= _TO_XYZ.sum(axis=1, keepdims=True)  # divided by the white point, so white is (1, 1, 1)
_FROM_XYZ = np.linalg.inv(_TO_XYZ)


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0 to 255 -> CIELAB float64 (..., 3), D65, 2 degree observer (IEC 61966-2-1, CIE 15)."""
    c = np.asarray(rgb, dtype=np.float64) / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIELAB (..., 3) -> sRGB uint8 (..., 3). A colour outside sRGB keeps lightness and hue and loses chroma."""
    lab = np.array(lab, dtype=np.float64)
    lab[..., 0] = lab[..., 0].clip(0, 100)
    linear = _linear(lab)
    # Clipping channels would turn a saturated navy purple; shrinking its chroma until it fits does not.
    for _ in range(30):
        outside = (linear < -1e-4).any(axis=-1) | (linear > 1 + 1e-4).any(axis=-1)
        if not outside.any():
            break
        lab[outside, 1:] *= 0.94
        linear[outside] = _linear(lab[outside])
    linear = linear.clip(0, 1)
    c = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(c * 255.0).astype(np.uint8)


def _linear(lab: np.ndarray) -> np.ndarray:
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2)
    return xyz @ _FROM_XYZ.T
