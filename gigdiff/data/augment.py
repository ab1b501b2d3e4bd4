"""Augmentation that keeps what a caption says: small shifts, slight colour jitter, and flips only when asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.color import lab2rgb, rgb2lab

from gigdiff.errors import InputError

__all__ = ["Augmentation", "augment"]

#: What colour_jitter=1.0 may do at most, in CIELAB. Chosen so that no base colour of the vocabulary comes nearer to
#: another one than to itself (its closest pairs, such as Maroon and Burgundy, lie some 8 apart); tests hold it to that.
MAX_LIGHTNESS_SHIFT = 3.0
MAX_CHROMA_SCALE = 0.06


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What `augment` may do. The default does nothing.

    flip: mirror half of the images. Off by default: it mirrors prints, logos, buttons and watch faces.
    shift: move by up to so many pixels each way; what comes in at the edge repeats the edge (white, for photos on
        white).
    colour_jitter: 0 to 1, how much lightness and chroma may change. Hue never does, and 1.0 stays within 4 CIEDE2000
        of the
        original: slight enough that the named colour holds.
    """

    flip: bool = False
    shift: int = 0
    colour_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise InputError(f"flip={self.flip!r}; True or False is allowed")
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or not 0 <= self.shift <= 64:
            raise InputError(f"shift={self.shift!r}; an integer of pixels from 0 to 64 is allowed")
        if not isinstance(self.colour_jitter, (int, float)) or not 0 <= self.colour_jitter <= 1:
            raise InputError(f"colour_jitter={self.colour_jitter!r}; a number from 0 to 1 is allowed")


def augment(
    image: Image.Image | NDArray[np.uint8], settings: Augmentation, *, seed: int, index: int = 0
) -> NDArray[np.uint8]:
    """Augment one image: RGB, PIL or uint8 (H, W, 3) -> uint8 (H, W, 3) of the same size, always a new array.

    What happens depends on (seed, index) alone; give the image's place as `index` and the epoch's seed as `seed`.
    Raises InputError when the image is no uint8 RGB.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise InputError(f"augment was given an image of mode {image.mode}; RGB is allowed: image.convert('RGB')")
    pixels = np.array(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(f"augment was given {pixels.dtype} {pixels.shape}; uint8 (height, width, 3) is allowed")
    random = _generator(seed, index)
    # All draws are made whatever the settings, so that turning one on doesn't change the others.
    flips = random.random() < 0.5
    down, right, lightness, chroma = random.uniform(-1, 1, size=4)
    if settings.flip and flips:
        pixels = pixels[:, ::-1].copy()
    if settings.shift:
        pixels = _shift(pixels, _steps(down, settings.shift), _steps(right, settings.shift))
    if settings.colour_jitter:
        pixels = _jitter(pixels, lightness * settings.colour_jitter, chroma * settings.colour_jitter)
    return pixels


def _generator(seed: int, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"augment\0{seed}\0{index}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _steps(place: float, most: int) -> int:
    """A place in [-1, 1) -> one of the 2 most + 1 whole steps, each as likely as the others."""
    return int(np.floor((place + 1) / 2 * (2 * most + 1))) - most


def _shift(pixels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[rows][:, columns]


def _jitter(pixels: NDArray[np.uint8], lightness: float, chroma: float) -> NDArray[np.uint8]:
    """Scale lightness and chroma in CIELAB. White and black stay as they are: the background must stay white."""
    lab = rgb2lab(pixels)
    level = lab[..., 0] / 100.0
    lab[..., 0] += lightness * MAX_LIGHTNESS_SHIFT * np.minimum(1.0, 4.0 * level * (1.0 - level))
    lab[..., 1:] *= 1.0 + chroma * MAX_CHROMA_SCALE
    return np.clip(np.rint(lab2rgb(lab) * 255.0), 0, 255).astype(np.uint8)
