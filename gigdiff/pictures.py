"""A picture that a user gives -- a path, a PIL image or an array -- as plain RGB, with what was lost told."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gigdiff.errors import DataError, InputError
from gigdiff.images import to_pil

__all__ = ["MAX_PIXELS", "SUFFIXES", "describe_changes", "open_mask", "open_picture"]

MAX_PIXELS = 50_000_000  # 150 MB once decoded; more is a mistake or a decompression bomb
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Picture = str | os.PathLike[str] | Image.Image | np.ndarray


def open_picture(source: Picture, name: str = "image") -> Image.Image:
    """RGB, upright, on white, in sRGB, its `.info` kept.

    Grey, palette, CMYK, 16-bit and transparent pictures are converted (`describe_changes` says what was lost).

    Args:
        source: a path, a PIL image, or uint8 (H, W, 3).
        name: what to call it in an error.

    Raises:
        InputError: of another type or shape, animated, or empty.
        DataError: a file that is missing, truncated, of an unknown format, or over 50 megapixels.
    """
    image = _open(source, name)
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(
            f"{name} is animated ({image.n_frames} frames); give a single picture, such as one frame saved as PNG."  # type: ignore[attr-defined]
        )
    from gigdiff.data.decoding import to_rgb as to_srgb

    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        image = ImageOps.exif_transpose(image) or image
    info = {key: value for key, value in image.info.items() if isinstance(value, str)}
    out = to_srgb(image)
    out = out.copy() if out is image else out
    out.info = info  # type: ignore[assignment]
    return out


def describe_changes(source: Picture) -> tuple[str, ...]:
    """What `open_picture` changes about this picture, for a note; () for plain RGB."""
    image = _open(source, "image")
    notes = []
    if image.has_transparency_data:
        notes.append("the picture's transparent parts were put on white")
    if image.mode == "CMYK":
        notes.append("the picture was CMYK and was converted to sRGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        notes.append("the picture had more than 8 bits a channel, which were rounded")
    return tuple(notes)


def open_mask(source: Picture, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W), True where the picture is to be drawn anew (white; in diffusers too).

    Args:
        source: a path, a PIL image, or an array (H, W), bool, uint8 or float in 0 to 1.
        size: (width, height) of the picture that it belongs to.

    Raises:
        InputError: of another size, all black (nothing to draw) or all white (use `edit` without a mask).
    """
    if isinstance(source, np.ndarray) and source.ndim == 2:
        if source.dtype == bool:
            values = source
        elif source.dtype == np.uint8:
            values = source >= 128
        elif np.issubdtype(source.dtype, np.floating):
            values = source >= 0.5
        else:
            raise InputError(f"mask_image is an array of {source.dtype}; bool, uint8 or float (H, W) is allowed.")
    else:
        image = _open(source, "mask_image")
        # A mask drawn on a transparent layer is in the alpha channel; all else is in how light it is.
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
        use_alpha = alpha is not None and int(alpha.min()) != int(alpha.max()) and image.mode != "P"
        values = np.asarray(image.convert("L")) >= 128 if not use_alpha else np.asarray(alpha) >= 128
    height, width = values.shape
    if (width, height) != size:
        raise InputError(
            f"mask_image is {height} x {width} and the picture {size[1]} x {size[0]} (height x width); they must be "
            "the same: resize the mask."
        )
    if not values.any():
        raise InputError("mask_image is all black: nothing would be drawn. White marks what is to be drawn anew.")
    if values.all():
        raise InputError(
            "mask_image is all white: nothing of the picture would stay. Leave the mask out (strength says how much of "
            "the picture is kept), or use gigdiff.generate."
        )
    return values


def _open(source: Picture, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        try:
            source.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name} can't be decoded ({error}); it is truncated or damaged.") from error
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise InputError(
                f"{name} is an array of {source.dtype} {source.shape}; uint8 (height, width, 3) is allowed."
            )
        return to_pil(source)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"{name} is a {type(source).__name__}; give a path, a PIL image or a uint8 array (H, W, 3).")
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f'{name}: there is no file "{path}".')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the lower one
            image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f'{name} "{path}" has {image.height} x {image.width} = {image.width * image.height:,} pixels; at most '
                f"{MAX_PIXELS:,} are taken: make it smaller."
            )
        image.load()
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(
            f'{name} "{path}" is of no format that is read; allowed are {", ".join(SUFFIXES)}: convert it.'
        ) from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f'{name} "{path}" can\'t be decoded ({error}); it is truncated or damaged.') from error
    return image
