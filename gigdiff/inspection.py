"""What a picture file says about where it comes from, and drawing it again from that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigdiff import xmp
from gigdiff.errors import GigdiffError, InputError, MissingDependencyError, ModelMismatchError
from gigdiff.provenance import XMP_KEYWORD, lora_hash, read

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["inspect_file", "redraw"]

Section = dict[str, str]


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Section]:
    """Everything a picture file says of its origin, as section -> field -> text; an empty section says nothing.

    "file": format, size. "made with": gigdiff's fields. "marking": IPTC's DigitalSourceType. "watermark": whether the
    invisible mark is in the pixels. "signature": the C2PA manifest.

    Raises:
        DataError: it is not a picture.
    """
    from PIL import Image

    fields = read(path)
    packet = fields.pop(XMP_KEYWORD, "")
    with Image.open(path) as image:
        size = f"{image.height} x {image.width} px (height x width)"
        described = {"path": str(path), "format": str(image.format), "size": size, "bytes": f"{_size(path):,}"}
        image.load()
        mark = _watermark(image)
    try:
        from gigdiff.signing import read_signature

        signature = read_signature(path)
    except MissingDependencyError as error:
        signature = {"not checked": str(error)}
    kind = xmp.source_type(packet)
    return {
        "file": described,
        "made with": fields,
        "marking": {"DigitalSourceType": kind} if kind else {},
        "watermark": mark,
        "signature": signature,
    }


def redraw(path: str | os.PathLike[str], device: str | None = None) -> tuple[Image.Image, dict[str, str]]:
    """Draws a file's picture again from what the file says: the same pixels, on the same kind of machine.

    Returns:
        The picture, post-processed as the file was (`provenance.save` puts a watermark in), and the file's fields.

    Raises:
        InputError: the file does not say enough, or is an edit of a picture that it does not hold.
        ModelMismatchError: the model or LoRA here has other weights than the file's.
    """
    from gigdiff import api

    fields = read(path)
    missing = [name for name in ("prompt", "seed", "model") if name not in fields]
    if missing:
        raise InputError(f'"{path}" can\'t be drawn again: it has no {", ".join(missing)}. It may come from elsewhere.')
    if "edit" in fields:
        raise InputError(
            f'"{path}" is an edit ({fields["edit"]}) of another picture ({fields.get("source_image", "?")}), '
            "which is not in the file: run `gigdiff edit` on it with the settings that `gigdiff inspect` shows."
        )
    if "\n" in fields["seed"]:
        raise InputError(f'"{path}" is a contact sheet of several pictures; draw one again from its own file.')
    if "cut" in fields:
        raise InputError(f'"{path}" holds only the beginning of its {fields["cut"]}, so it can\'t be drawn again.')
    loras = [line.rpartition(" at ") for line in fields.get("lora", "").splitlines()]
    hashes = fields.get("lora_weights", "").splitlines()
    for (name, _, _), expected in zip(loras, hashes, strict=False):
        if expected and lora_hash(name) not in ("", expected):
            raise ModelMismatchError(f"LoRA {name} has changed since: {lora_hash(name)} here, {expected} in the file.")
    names, scales = [name for name, _, _ in loras], [float(scale) for _, _, scale in loras]
    request = api.build_request(
        fields["prompt"],
        negative_prompt=fields.get("negative_prompt"),
        seed=int(fields["seed"]),
        num_inference_steps=_whole(fields, "num_inference_steps"),
        guidance_scale=float(fields["guidance_scale"]) if "guidance_scale" in fields else None,
        guidance_reuse=_whole(fields, "guidance_reuse") or 1,
        height=_whole(fields, "height"),
        width=_whole(fields, "width"),
        lora=names or None,
        lora_scale=scales or 1.0,
        truncation=float(fields["truncation"]) if "truncation" in fields else None,
        scheduler=fields.get("scheduler"),
    )
    upscale = fields.get("upscaler", False)
    model: Any = fields["model"]
    if "backend" in fields:
        backend, _, precision = fields["backend"].partition(" ")
        model, device = api.load(model, device, precision or None, backend=backend), None
    result = api.join_results(
        list(
            api.iter_results(
                request,
                model=model,
                device=device,
                upscale=upscale,
                fidelity=float(fields["fidelity"]) if "fidelity" in fields else None,
            )
        )
    )
    for what, ours, theirs in (
        (fields["model"], result.weights, fields.get("weights", "")),
        (str(upscale), result.extra.get("upscaler_weights", ""), fields.get("upscaler_weights", "")),
    ):
        if theirs and ours != theirs:
            raise ModelMismatchError(
                f"{what} has other weights ({ours}) than the one that drew the file ({theirs}): it would give another "
                "picture. Install the version of gigdiff in the file's Software field, or give that model's folder."
            )
    picture = result.pictures()[0]
    if "postprocess" in fields:
        from gigdiff.postprocess import parse_steps, postprocess

        picture = postprocess(picture, parse_steps(fields["postprocess"]))
    return picture, fields


def _whole(fields: Mapping[str, str], name: str) -> int | None:
    return int(fields[name]) if name in fields else None


def _size(path: str | os.PathLike[str]) -> int:
    return Path(path).stat().st_size


def _watermark(image: object) -> Section:
    from gigdiff.watermark import SCHEME, THRESHOLD, detect

    try:
        z = detect(image)  # type: ignore[arg-type]
    except GigdiffError as error:
        return {"not checked": str(error)}
    found = "found" if z > THRESHOLD else "not found"
    return {SCHEME: f"{found} ({z:.1f} standard deviations; more than {THRESHOLD:g} is found)"}
