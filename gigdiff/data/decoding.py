"""Encoded image bytes -> an RGB photo, whatever the file's mode, and never a bomb."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageOps

from gigdiff.errors import DataError

__all__ = ["MAX_IMAGE_PIXELS", "decode_image", "to_rgb"]

#: 50 megapixels: more than any shop photo, and 150 MB once decoded.
MAX_IMAGE_PIXELS = 50_000_000

#: Modes in which Pillow keeps more than 8 bits; its own convert("RGB") clips them to 255 instead of scaling.
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image file's bytes to RGB, upright, with transparency on white.

    Greyscale, palette, CMYK, YCbCr, alpha, 16-bit and float files all come out as 8-bit RGB; an embedded colour profile
    is converted to sRGB; EXIF orientation is applied; of several frames the first is taken.

    Raises DataError when the bytes are no image, are truncated, or would decode to more than `max_pixels` pixels. The
    pixel count is read from the header, before anything is decoded.
    """
    if not data:
        raise DataError("the image is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit, below, is the lower one
            image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"the image has {width} x {height} = {width * height:,} pixels, at most {max_pixels:,} are allowed "
                "(a decompression bomb, or raise max_image_pixels)"
            )
        image.load()
    except Image.DecompressionBombError as error:
        raise DataError(f"the image is too large: {error}; at most {max_pixels:,} pixels are allowed") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise DataError(
            f"the image can't be decoded ({type(error).__name__}: {error}); it is corrupt or truncated"
        ) from error
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels: leave them as they are
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB on white in sRGB, from any mode, by the embedded colour profile where there is one. Not turned upright."""
    if image.mode in _DEEP_MODES:
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        converted = _from_profile(image, profile)
        if converted is not None:
            return converted
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:  # "I" and "F" state no range: take the smallest usual one that holds the values
        top = next((t for t in (1.0, 255.0, 65535.0) if values.max() <= t), float(values.max()))
        if image.mode == "I" and top == 1.0:
            top = 255.0
    return Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image in sRGB, or None when its profile is broken or of another colour space than its pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source) and image.mode == "RGB":
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
