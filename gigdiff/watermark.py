"""An invisible mark in the pixels that says "made by a model", for when the metadata is stripped.

Spread spectrum (Cox et al. 1997, IEEE TIP 6(12)): a fixed pseudo-random pattern, band-limited so that JPEG keeps it and
laid out in coordinates relative to the picture so that resizing keeps it, is added to the luminance. Pure white is
left alone, because shops demand a pure white background; the mark is in the product. Detection correlates the whitened
picture with the pattern at every cyclic shift and asks how far the true position stands out:

    z = c(0, 0) / std of c elsewhere,

so the picture is its own control: on an unmarked picture z is close to standard normal whatever it shows, and
THRESHOLD fixes the rate of false alarms. benchmarks/watermark.py measures both rates.

It says yes or no and carries no message. Cropping, padding and rotating move the picture against the pattern and lose
it. The key is public: who knows this file can remove the mark, or put it into a photo.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from PIL import Image

from gigdiff.errors import InputError
from gigdiff.foreground import blur
from gigdiff.images import to_pil, to_rgb

__all__ = ["SCHEME", "THRESHOLD", "detect", "embed"]

SCHEME = "gigdiff-spread-spectrum-1"
THRESHOLD = 4.0  # standard deviations; a normal variable exceeds it 3 times in 100,000

GRID = 256  # the pattern's own resolution, both ways
LOW, HIGH = 6.0, 32.0  # its band, in cycles across the picture
MIN_SIDE = 48
LUMA = np.array([0.299, 0.587, 0.114])


def embed(image: Image.Image | np.ndarray, strength: float = 1.0) -> Image.Image:
    """The picture with the mark in it, the same size; metadata in `.info` is kept.

    A pixel changes by about 2 grey levels at strength 1, more where the picture is busy, not at all where it is white.

    Args:
        image: PIL image or uint8 (H, W, 3), at least 48 pixels each way.
        strength: 0 to 4.

    Raises:
        InputError: too small a picture, or a strength out of range.
    """
    picture = to_pil(image) if isinstance(image, np.ndarray) else to_rgb(image)
    if not 0 <= strength <= 4:
        raise InputError(f"strength={strength} is out of range; allowed are 0 to 4.")
    _check_size(picture)
    pixels = np.asarray(picture, dtype=np.float64)
    amplitude = strength * _amplitude(pixels)
    marked = pixels + (amplitude * _pattern_at(picture.height, picture.width))[..., None]
    # White stays white to the last bit, also for the rounding.
    marked = np.where(_is_white(pixels)[..., None], pixels, marked)
    out = to_pil(np.clip(np.rint(marked), 0, 255).astype(np.uint8))
    out.info.update(picture.info)
    return out


def detect(image: Image.Image | np.ndarray) -> float:
    """How far the mark stands out, in standard deviations; above THRESHOLD it is there. 0.0 for a blank picture.

    Args:
        image: PIL image or uint8 (H, W, 3), at least 48 pixels each way.
    """
    picture = to_pil(image) if isinstance(image, np.ndarray) else to_rgb(image)
    _check_size(picture)
    grey = np.asarray(picture, dtype=np.float64) @ LUMA
    smooth = blur(grey, max(1, min(grey.shape) // 32))
    residual = grey - smooth
    # Equal loudness everywhere: a few hard edges would otherwise drown the rest.
    residual /= 2.0 + np.sqrt(blur(residual**2, max(1, min(grey.shape) // 32)))
    residual[_is_white(np.asarray(picture, dtype=np.float64))] = 0.0
    on_grid = Image.fromarray(residual.astype(np.float32)).resize((GRID, GRID), Image.Resampling.BICUBIC)
    spectrum = np.fft.fft2(np.asarray(on_grid, dtype=np.float64))
    spectrum = spectrum * _band() / (_radial_mean(np.abs(spectrum)) + 1e-9)
    surface = np.fft.ifft2(spectrum * np.conj(np.fft.fft2(_pattern()))).real
    elsewhere = surface.copy()
    near = GRID // int(LOW) // 4  # the pattern resembles itself this far
    for rows in (slice(0, near), slice(-near, None)):
        for columns in (slice(0, near), slice(-near, None)):
            elsewhere[rows, columns] = 0.0
    spread = float(np.sqrt((elsewhere**2).sum() / (GRID**2 - 4 * near**2)))
    return float(surface[0, 0]) / spread if spread > 1e-9 else 0.0


def _check_size(picture: Image.Image) -> None:
    if min(picture.size) < MIN_SIDE:
        raise InputError(
            f"a picture of {picture.height} x {picture.width} (height x width) is too small for the watermark; "
            f"it needs {MIN_SIDE} pixels each way."
        )


@functools.cache
def _pattern() -> np.ndarray:
    """The pattern (GRID, GRID), zero mean, unit variance, the same on every machine (Philox is exact)."""
    key = int.from_bytes(hashlib.sha256(SCHEME.encode()).digest()[:16], "little")
    noise = np.random.Generator(np.random.Philox(key=key)).random((GRID, GRID)) - 0.5
    pattern = np.fft.ifft2(np.fft.fft2(noise) * _band()).real
    return pattern / pattern.std()


@functools.cache
def _radius() -> np.ndarray:
    cycles = np.fft.fftfreq(GRID) * GRID
    return np.hypot(cycles[:, None], cycles[None, :])


@functools.cache
def _band() -> np.ndarray:
    """1 within the band, with soft ends."""
    r = _radius()
    return np.clip((r - LOW) / 2 + 0.5, 0, 1) * np.clip((HIGH - r) / 4 + 0.5, 0, 1)


def _radial_mean(magnitude: np.ndarray) -> np.ndarray:
    """The mean magnitude of each frequency's ring."""
    ring = np.rint(_radius()).astype(int)
    mean = np.bincount(ring.ravel(), magnitude.ravel()) / np.bincount(ring.ravel())
    return mean[ring]


def _pattern_at(height: int, width: int) -> np.ndarray:
    small = Image.fromarray(_pattern().astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(small, dtype=np.float64)
    return values / values.std()


def _amplitude(pixels: np.ndarray) -> np.ndarray:
    """Grey levels (H, W) by which the pattern's unit changes each pixel: more in texture, fading out towards white."""
    grey = pixels @ LUMA
    reach = max(1, min(grey.shape) // 32)
    spread = np.sqrt(np.maximum(blur(grey**2, reach) - blur(grey, reach) ** 2, 0))
    # Small pictures have few pixels to hide it in, and are seen enlarged in no shop: they bear more.
    base = 1.8 * np.clip(240 / min(grey.shape), 1.0, 2.5) ** 0.5
    fade = np.clip((252 - grey) / 6, 0, 1)
    # A small product has few pixels that can bear the mark, so each bears more: z goes with strength times area^0.5.
    base *= np.clip((0.3 / max(float(fade.mean()), 1e-3)) ** 0.5, 0.8, 2.0)
    return np.clip(base + 0.14 * spread, 0, 3 * base) * fade


def _is_white(pixels: np.ndarray) -> np.ndarray:
    return pixels.min(axis=-1) >= 250
