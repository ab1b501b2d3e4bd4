"""What a shop does to a picture before it goes online: plain functions, run in the order that you give, off by default.

    postprocess(image, ["white_balance", ("crop_to_product", {"margin": 0.05}), ("pad", {"ratio": "4:5"})])

A sensible order: to_srgb, white_balance, denoise, crop_to_product, background, shadow, pad, limit_size, sharpen. All
come before the watermark and the metadata. Every function takes and gives an RGB PIL image and keeps its `.info`.
Those that look for the product expect a plain background, see gigdiff.foreground.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFilter

from gigdiff.colour import rgb_to_lab
from gigdiff.errors import InputError, nearest
from gigdiff.foreground import background_colour, blur, bounding_box, product_mask
from gigdiff.images import WHITE, to_pil, to_rgb

__all__ = [
    "MARKETPLACES",
    "STEPS",
    "background",
    "crop_to_product",
    "denoise",
    "limit_size",
    "pad",
    "parse_steps",
    "postprocess",
    "shadow",
    "sharpen",
    "to_srgb",
    "white_balance",
]

#: Marketplace -> (least, greatest) pixels of the longer side that it takes or recommends, held against public summaries
#: of their rules in November 2026; they change, so check before a large job.
MARKETPLACES: dict[str, tuple[int, int]] = {
    "amazon": (1000, 10_000),  # 500 is the least accepted, 1000 makes zoom work
    "ebay": (500, 9000),
    "etsy": (1000, 3000),
    "google": (500, 8000),  # Merchant Center: 500 from January 2027 (apparel was 250); at most 64 megapixels
    "shopify": (200, 4472),  # 20 megapixels of a square
}
RATIOS = {"square": (1, 1)}
MAX_RATIO = 10

Step = str | tuple[str, Mapping[str, Any]]


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert from the embedded colour profile to sRGB, and say so in the file by an sRGB profile."""
    profile, srgb = image.info.get("icc_profile"), ImageCms.createProfile("sRGB")
    out = image
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            out = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError):  # a broken profile says nothing; the pixels are taken as sRGB
            out = image
    out = _like(to_rgb(out), image)
    out.info["icc_profile"] = ImageCms.ImageCmsProfile(srgb).tobytes()
    return out


def white_balance(image: Image.Image, strength: float = 1.0) -> Image.Image:
    """Make a light background neutral and white, by one factor a channel (von Kries in linear-ish sRGB).

    A background darker than L* = 70 is left as it is: it is meant.

    Args:
        strength: 0 to 1, how far.
    """
    _check("white_balance strength", strength, 0, 1)
    pixels = np.asarray(to_rgb(image), dtype=np.float64)
    lightness = background_colour(np.asarray(to_rgb(image)))[0]
    if lightness < 70:
        return image
    alike = np.abs(rgb_to_lab(pixels)[..., 0] - lightness) < 4
    ground = np.median(pixels[alike], axis=0).clip(1, 255)
    return _like(_to_image(pixels * (1 + strength * (255 / ground - 1))), image)


def denoise(image: Image.Image, strength: float = 0.5) -> Image.Image:
    """Smooth what varies little and keep edges: a guided filter (He et al. 2013, IEEE TPAMI 35(6), eq. 5 to 8).

    Args:
        strength: 0 to 1; noise of up to about 12 grey levels goes at 1.
    """
    _check("denoise strength", strength, 0, 1)
    p = np.asarray(to_rgb(image), dtype=np.float64)
    epsilon = (12.0 * strength) ** 2
    mean = blur(p, 2)
    variance = np.maximum(blur(p * p, 2) - mean**2, 0)
    a = variance / (variance + epsilon + 1e-9)
    return _like(_to_image(blur(a, 2) * p + blur((1 - a) * mean, 2)), image)


def sharpen(image: Image.Image, amount: float = 0.5, radius: float = 1.0) -> Image.Image:
    """Unsharp mask.

    Args:
        amount: 0 to 3. radius: of the blur that is subtracted, in pixels, 0.1 to 20.
    """
    _check("sharpen amount", amount, 0, 3)
    _check("sharpen radius", radius, 0.1, 20)
    return _like(to_rgb(image).filter(ImageFilter.UnsharpMask(radius, round(100 * amount), 1)), image)


def crop_to_product(image: Image.Image, margin: float = 0.05) -> Image.Image:
    """Cut to the product and a margin around it; beyond the picture's edge the background's colour is added.

    Args:
        margin: 0 to 1, of the product's longer side. A picture in which no product is found stays as it is.
    """
    _check("crop_to_product margin", margin, 0, 1)
    picture = to_rgb(image)
    pixels = np.asarray(picture)
    box = bounding_box(product_mask(pixels))
    if box is None:
        return image
    left, top, right, bottom = box
    extra = round(margin * max(right - left, bottom - top))
    frame = Image.new("RGB", (right - left + 2 * extra, bottom - top + 2 * extra), _ground(pixels))
    inside = (max(0, left - extra), max(0, top - extra), right + extra, bottom + extra)
    part = picture.crop((*inside[:2], min(inside[2], picture.width), min(inside[3], picture.height)))
    frame.paste(part, (inside[0] - left + extra, inside[1] - top + extra))
    return _like(frame, image)


def background(image: Image.Image, ground: str | Image.Image = "white") -> Image.Image:
    """Put the product before another background.

    Args:
        ground: "white", a colour that Pillow knows ("#f4f4f4"), a picture, or the path of one; it is resized to cover.
    """
    picture = to_rgb(image)
    pixels = np.asarray(picture, dtype=np.float64)
    mask = product_mask(np.asarray(picture))[..., None]
    old = np.median(pixels[mask[..., 0] == 0], axis=0) if (mask == 0).any() else np.array([255.0] * 3)
    new = np.asarray(_ground_picture(ground, picture.size), dtype=np.float64)
    # An outline's pixel is mask * product + (1 - mask) * old background: only the second part is exchanged.
    return _like(_to_image(pixels + (1 - mask) * (new - np.where(mask > 0, old, pixels))), image)


def shadow(image: Image.Image, opacity: float = 0.35, softness: float = 0.04) -> Image.Image:
    """A soft shadow on the ground below the product.

    Args:
        opacity: 0 to 1. softness: 0.005 to 0.2, of the picture's shorter side.
    """
    _check("shadow opacity", opacity, 0, 1)
    _check("shadow softness", softness, 0.005, 0.2)
    picture = to_rgb(image)
    mask = product_mask(np.asarray(picture))
    box = bounding_box(mask)
    if box is None:
        return image
    left, _, right, bottom = box
    height, width = mask.shape
    y, x = np.mgrid[:height, :width]
    flat = max(2.0, 0.06 * (right - left))
    ellipse = ((x - (left + right - 1) / 2) / max(1.0, 0.46 * (right - left))) ** 2 + (
        (y - (bottom - 1 - flat / 3)) / flat
    ) ** 2 < 1
    soft = ellipse.astype(np.float64)
    for _ in range(3):  # three box means are nearly a Gaussian
        soft = blur(soft, max(1, round(softness * min(height, width) / 2)))
    dark = opacity * soft * (1 - mask)
    return _like(_to_image(np.asarray(picture, dtype=np.float64) * (1 - dark[..., None])), image)


def pad(image: Image.Image, ratio: str = "square", colour: str = "") -> Image.Image:
    """Widen the picture to an aspect ratio; nothing is cut.

    Args:
        ratio: "square", or width:height such as "4:5" and "16:9".
        colour: a name or "#rrggbb"; "" takes the background's own.
    """
    picture = to_rgb(image)
    width, height = padded_size(picture.width, picture.height, ratio)
    frame = Image.new("RGB", (width, height), _colour(colour) if colour else _ground(np.asarray(picture)))
    frame.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return _like(frame, image)


def padded_size(width: int, height: int, ratio: str) -> tuple[int, int]:
    """(width, height) of the smallest frame of that ratio ("square", "4:5") around a picture.

    Raises:
        InputError: not a ratio, or one beyond 10:1.
    """
    try:
        across, down = RATIOS[ratio] if ratio in RATIOS else tuple(float(part) for part in ratio.split(":"))
        if not (across > 0 and down > 0 and 1 / MAX_RATIO <= across / down <= MAX_RATIO):
            raise ValueError
    except (ValueError, AttributeError):
        raise InputError(
            f'ratio "{ratio}" is none; give "square" or width:height such as "4:5" or "16:9", at most {MAX_RATIO}:1.'
        ) from None
    return max(width, round(height * across / down)), max(height, round(width * down / across))


def limit_size(
    image: Image.Image,
    marketplace: str | None = None,
    min_side: int | None = None,
    max_side: int | None = None,
    enlarge: bool = False,
) -> Image.Image:
    """Bring the longer side within a marketplace's limits; a larger picture is made smaller.

    Args:
        marketplace: one of MARKETPLACES. min_side, max_side: pixels, instead of or over the marketplace's.
        enlarge: enlarge a smaller one by interpolation, which adds no detail. Without it, that is an error.
    """
    if marketplace is not None and marketplace not in MARKETPLACES:
        raise InputError(f'marketplace "{marketplace}" is unknown; {nearest(str(marketplace), MARKETPLACES)}.')
    least, most = MARKETPLACES.get(marketplace or "", (1, 100_000))
    least, most = least if min_side is None else int(min_side), most if max_side is None else int(max_side)
    if not 1 <= least <= most:
        raise InputError(f"limit_size got min_side={least}, max_side={most}; 1 <= min_side <= max_side is allowed.")
    longer = max(image.size)
    if longer < least and not enlarge:
        raise InputError(
            f"the picture's longer side is {longer} pixels, {marketplace or 'min_side'} asks for at least {least}: "
            "enlarge it with gigdiff.upscale (--upscale), or by interpolation with limit_size's enlarge=true."
        )
    scale = min(max(1.0, least / longer), most / longer)
    if scale == 1.0:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return _like(to_rgb(image).resize(size, Image.Resampling.LANCZOS), image)


#: Name -> function; a name is what `postprocess` and the command's --post take.
STEPS: dict[str, Callable[..., Image.Image]] = {
    "to_srgb": to_srgb,
    "white_balance": white_balance,
    "denoise": denoise,
    "crop_to_product": crop_to_product,
    "background": background,
    "shadow": shadow,
    "pad": pad,
    "limit_size": limit_size,
    "sharpen": sharpen,
}


def postprocess(image: Image.Image | np.ndarray, steps: Sequence[Step]) -> Image.Image:
    """Run the steps, in their order; `.info["postprocess"]` then lists them as `parse_steps` reads them.

    Args:
        image: PIL image or uint8 (H, W, 3).
        steps: names of STEPS, or (name, keyword arguments).

    Raises:
        InputError: an unknown step or argument, or a value out of its range; before anything is done where possible.
    """
    chosen = [_known(step) for step in steps]
    out = to_pil(image) if isinstance(image, np.ndarray) else image
    for name, arguments in chosen:
        out = STEPS[name](out, **arguments)
    if chosen:
        out = _like(out.copy(), out)
        out.info["postprocess"] = "; ".join(_say(name, arguments) for name, arguments in chosen)
    return out


def parse_steps(texts: str | Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Steps as a command line writes them: "denoise", "pad:ratio=4:5", "sharpen:amount=0.4,radius=2"; ";" joins them.

    Raises:
        InputError: as `postprocess`.
    """
    joined = texts if isinstance(texts, str) else ";".join(texts)
    steps = []
    for text in filter(None, (part.strip() for part in joined.split(";"))):
        name, _, rest = text.partition(":")
        arguments = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(f'"{text}" is no step: write name or name:argument=value, as in "pad:ratio=4:5".')
            arguments[key.strip()] = _value(value.strip())
        steps.append(_known((name.strip(), arguments)))
    return steps


def _known(step: Step) -> tuple[str, dict[str, Any]]:
    name, arguments = (step, {}) if isinstance(step, str) else (step[0], dict(step[1]))
    if name not in STEPS:
        raise InputError(f'post-processing step "{name}" is unknown; {nearest(str(name), STEPS)}.')
    allowed = [parameter for parameter in inspect.signature(STEPS[name]).parameters if parameter != "image"]
    for key in arguments:
        if key not in allowed:
            raise InputError(f'{name} has no argument "{key}"; it takes: {", ".join(allowed) or "none"}.')
    return name, arguments


def _say(name: str, arguments: Mapping[str, Any]) -> str:
    pairs = ",".join(
        f"{key}={value if not isinstance(value, Image.Image) else 'picture'}" for key, value in arguments.items()
    )
    return f"{name}:{pairs}" if pairs else name


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; a number from {low:g} to {high:g} is allowed.")


def _to_image(pixels: np.ndarray) -> Image.Image:
    return to_pil(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _like(new: Image.Image, old: Image.Image) -> Image.Image:
    """The new picture with the old one's metadata."""
    new.info.update(old.info)
    return new


def _ground(pixels: np.ndarray) -> tuple[int, int, int]:
    """The background's colour as sRGB: white, where it is that to within two levels."""
    depth = max(1, min(pixels.shape[:2]) // 40)
    frame = np.concatenate(
        [p.reshape(-1, 3) for p in (pixels[:depth], pixels[-depth:], pixels[:, :depth], pixels[:, -depth:])]
    )
    near = np.linalg.norm(rgb_to_lab(frame) - background_colour(pixels), axis=-1) < 4
    colour = np.median(frame[near], axis=0) if near.any() else np.array(WHITE)
    return WHITE if colour.min() >= 253 else tuple(round(float(c)) for c in colour)  # type: ignore[return-value]


def _colour(text: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError):
        raise InputError(f'colour "{text}" is none; give a name such as "white", or "#rrggbb".') from None


def _ground_picture(ground: str | Image.Image, size: tuple[int, int]) -> Image.Image:
    if isinstance(ground, str) and not Path(ground).suffix:
        return Image.new("RGB", size, _colour(ground))
    from gigdiff.pictures import open_picture

    picture = open_picture(ground)
    scale = max(size[0] / picture.width, size[1] / picture.height)
    wide = picture.resize((max(size[0], round(picture.width * scale)), max(size[1], round(picture.height * scale))))
    left, top = (wide.width - size[0]) // 2, (wide.height - size[1]) // 2
    return wide.crop((left, top, left + size[0], top + size[1]))
