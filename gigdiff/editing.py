"""`gigdiff.edit`: a picture that is there becomes another. What is given besides it says which edit it is.

    mask_image        draw anew where the mask is white            inpaint    model
    colour            the same product in another colour           recolour   no model, unless strength is given
    reference_image   its product's colours and contrast           restyle    no model, unless strength is given
    background        another background                           background no model
    aspect_ratio      a wider or taller picture, the rest drawn    outpaint   model
    nothing else      image-to-image; without a prompt: variations image      model

A model works at its own size; with a mask its pixels are brought to the picture's size and pasted in, and every pixel
outside the mask is the picture's own, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gigdiff.errors import CapabilityError, InputError
from gigdiff.foreground import blur
from gigdiff.generators.request import Capabilities, EditStart, GenerationResult, ImageGenerator, check_number, validate
from gigdiff.images import fit_image, fitted_box, to_pil
from gigdiff.pictures import Picture, describe_changes, open_mask, open_picture
from gigdiff.postprocess import padded_size, postprocess
from gigdiff.provenance import complete, metadata, pixel_hash
from gigdiff.recolouring import asked_colour, match_palette, recolour, worn_rgb

if TYPE_CHECKING:
    from gigdiff.safety import Safety
    from gigdiff.upscaling import Upscaler

__all__ = ["edit"]

KINDS = ("mask_image", "colour", "reference_image", "background", "aspect_ratio")
DEFAULT_STRENGTH = {"image": 0.6, "variations": 0.7, "inpaint": 1.0, "outpaint": 1.0}
DEFAULT_PROMPT = "product photo"


def edit(
    image: Picture,
    prompt: str | None = None,
    *,
    mask_image: Picture | None = None,
    colour: str | None = None,
    reference_image: Picture | None = None,
    background: str | Image.Image | None = None,
    aspect_ratio: str | None = None,
    strength: float | None = None,
    num_resample_steps: int = 3,
    model: str | os.PathLike[str] | ImageGenerator = "mini",
    negative_prompt: str | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    lora: str | os.PathLike[str] | None = None,
    lora_scale: float = 1.0,
    device: str | None = None,
    upscale: bool | str | None = None,
    fidelity: float | None = None,
    safety: Safety | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Image.Image | list[Image.Image]:
    """Edits a picture; at most one of mask_image, colour, reference_image, background, aspect_ratio says how.

    Args:
        image: a path, a PIL image or uint8 (H, W, 3). Grey, palette, CMYK, 16-bit and transparent ones are converted,
            with a note; animated ones are refused.
        prompt: what to draw. "The same coat in navy" is a recolouring. None takes the picture's own, if it has one.
        mask_image: white where to draw anew; of the picture's size.
        colour: "navy", "dark red", "#102040".
        reference_image: whose colours and contrast to take.
        background: "white", a colour, a picture or its path.
        aspect_ratio: "square", "4:5", "16:9", ...: what the picture lacks to it is drawn.
        strength: above 0, up to 1: how much is drawn anew. Default: 0.6, variations 0.7, with a mask 1.0. For colour,
            reference_image: no model redraws the result unless this is given.
        num_resample_steps: with a mask, see EditStart.
        model and the rest: as `gigdiff.generate`. With a mask the picture's size is kept whatever `upscale` says.

    Returns:
        One RGB PIL image for num_images_per_prompt=1, else a list; each with what was done in `.info`.

    Raises:
        InputError, DataError: a picture, mask or argument; CapabilityError: a model that can't; else as `generate`.
    """
    picture = open_picture(image)
    given = [
        name
        for name, value in zip(KINDS, (mask_image, colour, reference_image, background, aspect_ratio), strict=True)
        if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were given; one edit at a time: edit the result again.")
    if not given and prompt is not None and (asked := asked_colour(prompt)) is not None:
        colour, given = asked, ["colour"]
    if strength is not None:
        check_number("strength", strength, 0.0, 1.0, "1 keeps next to nothing of the picture")
    kind = given[0] if given else "image" if prompt is not None else "variations"
    notes = describe_changes(image)
    fields = {"source_image": pixel_hash(np.asarray(picture)), "notes": "\n".join(notes)}
    if (strength is None and kind in ("colour", "reference_image")) or kind == "background":
        if num_images_per_prompt != 1:
            raise InputError(
                f"num_images_per_prompt={num_images_per_prompt}: this edit draws nothing, so all are alike."
            )
        done, fields["edit"] = _without_model(picture, colour, reference_image, background)
        return _described(done, fields)

    from gigdiff.api import build_request, choose_upscaler, find_generator

    mask = None
    if kind in ("colour", "reference_image"):
        picture, what = _without_model(picture, colour, reference_image, None)
    elif kind == "mask_image":
        what, mask = "inpaint", open_mask(mask_image, picture.size)  # type: ignore[arg-type]
    elif kind == "aspect_ratio":
        what = f"outpaint to {aspect_ratio}"
        picture, mask = _extended(picture, str(aspect_ratio))
    else:
        what = "image-to-image" if kind == "image" else "variations"
    default = DEFAULT_STRENGTH.get("inpaint" if mask is not None else kind, 0.4)
    text = prompt or picture.info.get("prompt") or DEFAULT_PROMPT
    request = build_request(
        str(text),
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        lora=lora,
        lora_scale=lora_scale,
    )
    if safety is not None:
        notes += safety.check_prompts(request.prompts)
    generator = find_generator(model, device)
    can = generator.capabilities
    needed = "inpaint" if mask is not None else "image_to_image"
    if not getattr(can, needed) or not hasattr(generator, "edit"):
        raise CapabilityError(
            f"{generator.name} can't edit pictures (it has no {needed}); take a diffusion model, such as mini."
        )
    height, width = _work_size(can, picture.size)
    request = validate(replace(request, height=height, width=width), can, generator.name)
    frame = fit_image(picture, height, width)
    start = EditStart(
        np.repeat(frame[None], len(request), 0),
        default if strength is None else float(strength),
        None if mask is None else _fitted_mask(mask, height, width),
        num_resample_steps,
    )
    result = generator.edit(request, start, on_step=on_step)
    fields |= {"edit": what, "strength": f"{start.strength:g}", "notes": "\n".join((*result.notes, *notes))}
    result = replace(result, extra={**result.extra, **fields}, weights=result.weights or _weights(generator))
    if safety is not None:
        result = safety.check_images(result)
    upscaler = choose_upscaler(upscale, fidelity, generator, device)
    if mask is not None:
        return _one_or_all(_pasted(result, picture, mask, upscaler), num_images_per_prompt)
    if upscaler is not None:
        result = upscaler.enlarge(result)
    return _one_or_all(result.pictures(), num_images_per_prompt)


def _without_model(
    picture: Image.Image, colour: str | None, reference: Picture | None, background: str | Image.Image | None
) -> tuple[Image.Image, str]:
    """The edits that are arithmetic, and what to call them in the file."""
    if colour is not None:
        return recolour(picture, worn_rgb(colour)), f"recolour to {colour}"
    if reference is not None:
        return match_palette(picture, open_picture(reference, "reference_image")), "restyle by a reference"
    named = background if isinstance(background, str) else "a picture"
    return postprocess(picture, [("background", {"ground": background})]), f"background {named}"


def _described(picture: Image.Image, fields: dict[str, str]) -> Image.Image:
    """The picture with its own fields and those of the edit."""
    texts = {key: text for key, text in picture.info.items() if isinstance(key, str) and isinstance(text, str)}
    texts.pop("Software", None)
    picture.info.update(complete(texts | {key: text for key, text in fields.items() if text}).items())
    return picture


def _extended(picture: Image.Image, ratio: str) -> tuple[Image.Image, np.ndarray]:
    """The picture amid a frame of that ratio, its edges drawn out, and the mask of what was added."""
    width, height = padded_size(picture.width, picture.height, ratio)
    if (width, height) == picture.size:
        raise InputError(f"the picture is {ratio} already; nothing would be drawn.")
    left, top = (width - picture.width) // 2, (height - picture.height) // 2
    pixels = np.pad(
        np.asarray(picture),
        ((top, height - picture.height - top), (left, width - picture.width - left), (0, 0)),
        mode="edge",
    )
    mask: np.ndarray = np.ones((height, width), bool)
    mask[top : top + picture.height, left : left + picture.width] = False
    out = to_pil(pixels)
    out.info.update(picture.info)
    return out, mask


def _work_size(can: Capabilities, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) to work at: the model's own; its area in the picture's shape where that is far off."""
    height, width = can.default_size
    shape, own = size[0] / size[1], width / height
    if can.sizes is not None or max(shape / own, own / shape) < 1.3:
        return height, width
    low, high = can.size_range
    step = can.size_multiple
    area = float(height * width)

    def whole(value: float) -> int:
        return int(min(high // step * step, max(-(-low // step) * step, round(value / step) * step)))

    return whole((area / shape) ** 0.5), whole((area * shape) ** 0.5)


def _fitted_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask as `fit_image` fits its picture; a pixel that is partly to be drawn is drawn."""
    left, top, right, bottom = fitted_box((mask.shape[1], mask.shape[0]), height, width)
    inner = Image.fromarray(mask.astype(np.uint8) * 255).resize((right - left, bottom - top), Image.Resampling.BOX)
    out: np.ndarray = np.zeros((height, width), bool)
    out[top:bottom, left:right] = np.asarray(inner) > 8
    return out


def _pasted(
    result: GenerationResult, picture: Image.Image, mask: np.ndarray, upscaler: Upscaler | None
) -> list[Image.Image]:
    """What was drawn inside the mask on the picture's own pixels outside it, at the picture's size."""
    old = np.asarray(picture)
    box = np.array(fitted_box(picture.size, *result.images.shape[1:3]))
    drawn = result
    if upscaler is not None and max(picture.size) > max(result.images.shape[1:3]):
        drawn = upscaler.enlarge(result)
    scale = drawn.images.shape[1] // result.images.shape[1]
    # Soft on the inside of the mask only: outside every pixel is the picture's own.
    reach = max(1, round(min(picture.size) / 80))
    alpha = np.where(mask, np.clip(2 * blur(mask.astype(np.float64), reach) - 1, 0, 1), 0.0)
    alpha = np.maximum(alpha, 0.35 * mask)[..., None]  # a mask thinner than that still changes its pixels
    pictures = []
    for i, image in enumerate(drawn.images):
        left, top, right, bottom = (int(edge) for edge in box * scale)
        inner = to_pil(image).crop((left, top, right, bottom))
        new = np.asarray(inner.resize(picture.size, Image.Resampling.LANCZOS), dtype=np.float64)
        out = to_pil(np.where(mask[..., None], np.rint(alpha * new + (1 - alpha) * old), old).astype(np.uint8))
        fields = metadata(drawn, i) | {"height": str(out.height), "width": str(out.width)}
        pictures.append(_described(out, fields))
    return pictures


def _weights(generator: ImageGenerator) -> str:
    from gigdiff.provenance import weights_hash

    return weights_hash(generator.folder)


def _one_or_all(pictures: list[Image.Image], asked: int) -> Image.Image | list[Image.Image]:
    return pictures[0] if asked == 1 else pictures
