"""What a saved picture says about itself: prompt, seed, model, settings, and that a trained model made it.

    pixels -> invisible watermark -> metadata -> C2PA signature

in this order, because each covers what came before; `save` keeps to it. The metadata are text fields and an XMP packet
with IPTC's DigitalSourceType, which is what shops, search engines and photo tools read to tell a generated picture from
a photo (see gigdiff.xmp).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gigdiff
from gigdiff import xmp
from gigdiff.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from gigdiff.generators.request import GenerationResult
    from gigdiff.signing import Signer

__all__ = [
    "DIGITAL_SOURCE_TYPE",
    "XMP_KEYWORD",
    "complete",
    "lora_hash",
    "metadata",
    "pixel_hash",
    "read",
    "save",
    "sheet_metadata",
    "weights_hash",
]

DIGITAL_SOURCE_TYPE = xmp.GENERATED
XMP_KEYWORD = "XML:com.adobe.xmp"  # where the PNG and XMP specifications put the packet


def metadata(result: GenerationResult, index: int) -> dict[str, str]:
    """Text fields for image `index` of a result; with the same model they are enough to draw it again."""
    request = result.request
    fields = {
        "Software": f"gigdiff {gigdiff.__version__}",
        "prompt": request.prompts[index],
        "negative_prompt": request.negative_prompts[index] if request.negative_prompts else "",
        "seed": str(request.seeds[index]),
        **_shared(result),
    }
    return complete(fields)


def sheet_metadata(result: GenerationResult) -> dict[str, str]:
    """Text fields for a contact sheet of the whole result: all prompts and seeds, one a line."""
    request = result.request
    fields = {
        "Software": f"gigdiff {gigdiff.__version__}",
        "prompt": "\n".join(dict.fromkeys(request.prompts)),
        "seed": "\n".join(map(str, dict.fromkeys(request.seeds))),
        **_shared(result),
    }
    return complete(fields)


def complete(fields: Mapping[str, str]) -> dict[str, str]:
    """The fields that are not empty, under gigdiff's name, with the XMP packet that holds them.

    A field "edit" says that the picture was made from one that was given: the packet then says composite.
    """
    named = {"Software": f"gigdiff {gigdiff.__version__}"} | dict(fields)
    filled = {key: text for key, text in named.items() if text and key != XMP_KEYWORD}
    return filled | {XMP_KEYWORD: xmp.packet(filled)}


def _shared(result: GenerationResult) -> dict[str, str]:
    request = result.request
    return {
        "model": result.model,
        "weights": result.weights,
        "height": str(request.height or ""),
        "width": str(request.width or ""),
        "num_inference_steps": str(request.num_inference_steps or ""),
        "guidance_scale": "" if request.guidance_scale is None else f"{request.guidance_scale:g}",
        "guidance_reuse": "" if request.guidance_reuse == 1 else str(request.guidance_reuse),
        "truncation": "" if request.truncation is None else f"{request.truncation:g}",
        "scheduler": request.scheduler or "",
        "lora": "\n".join(f"{lora} at {scale:g}" for lora, scale in request.adapters()),
        "notes": "\n".join(result.notes),
        **result.extra,
    }


def save(
    path: str | os.PathLike[str],
    image: Image.Image | np.ndarray,
    fields: Mapping[Any, Any],
    *,
    overwrite: bool = False,
    quality: int = 92,
    watermark: bool = False,
    signer: Signer | None = None,
) -> Path:
    """Writes a picture with its metadata, watermarked and signed where asked for, in the order above.

    Args:
        path, overwrite, quality: as `gigdiff.images.save_image`.
        image: the finished pixels, post-processing done: what comes after would harm watermark and signature.
        fields: `metadata(result, i)`, or a picture's `.info`.
        watermark: put the invisible mark in (gigdiff.watermark).
        signer: signs the finished file (gigdiff.signing).

    Raises:
        InputError, OutputError: as `save_image`. MissingDependencyError: signing without c2pa-python.
    """
    from gigdiff.images import check_writable, save_image

    path = check_writable(path, overwrite)
    texts = {key: text for key, text in fields.items() if isinstance(key, str) and isinstance(text, str)}
    if watermark:
        from gigdiff.watermark import SCHEME, embed

        image, texts["watermark"] = embed(image), SCHEME
    texts = complete(texts)
    if signer is None:
        return save_image(path, image, texts, overwrite, quality)
    from gigdiff.signing import sign_file

    unsigned = path.with_name(f".{path.stem}.{os.getpid()}.unsigned{path.suffix}")
    try:
        save_image(unsigned, image, texts, overwrite=True, quality=quality)
        return sign_file(unsigned, path, signer, edited="edit" in texts)
    finally:
        unsigned.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text fields of a PNG, JPEG or WebP file, its XMP packet (anybody's) under XMP_KEYWORD.

    Raises:
        DataError: it is not a whole picture of a format that Pillow reads.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # a PNG's chunks may follow the pixels
            fields = {key: str(text) for key, text in getattr(image, "text", {}).items()}
            packet = image.info.get("xmp")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f'"{path}" can\'t be read as a picture: {error}') from error
    if packet and XMP_KEYWORD not in fields:
        text = packet.decode("utf-8", errors="replace") if isinstance(packet, bytes) else str(packet)
        fields = xmp.parse(text) | fields | {XMP_KEYWORD: text}
    return fields


def pixel_hash(image: np.ndarray) -> str:
    """A short hash (16 hex digits) of uint8 pixels and their shape: which picture an edit began with."""
    return hashlib.sha256(f"{image.shape}|".encode() + image.tobytes()).hexdigest()[:16]


def lora_hash(name: str) -> str:
    """A short hash of a LoRA file or folder; "" for a hub id, whose files are the hub's."""
    path = Path(name).expanduser()
    if path.is_file():
        return _file_hash(path)[:16]
    return weights_hash(path) if path.is_dir() else ""


def weights_hash(folder: Path | None) -> str:
    """A short hash (16 hex digits) over all .safetensors files below a folder, by name and content; "" for no folder.

    The hub's cache names its blobs by sha256, so a model from the hub is not read again.
    """
    if folder is None:
        return ""
    whole = hashlib.sha256()
    files = sorted(folder.rglob("*.safetensors"))
    for path in files:
        whole.update(f"{path.relative_to(folder).as_posix()}\0{_file_hash(path)}\n".encode())
    return whole.hexdigest()[:16] if files else ""


def _file_hash(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
