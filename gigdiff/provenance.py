"""What a saved picture says about itself: prompt, seed, model, settings, and that a trained model made it.

PNG only so far: one text chunk a field, and an XMP packet with IPTC's DigitalSourceType, which is what shops, search
engines and photo tools read to tell a generated picture from a photo.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import gigdiff

if TYPE_CHECKING:
    from gigdiff.generators.request import GenerationResult

__all__ = ["DIGITAL_SOURCE_TYPE", "XMP_KEYWORD", "metadata", "read", "sheet_metadata", "weights_hash"]

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
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
    return {key: text for key, text in fields.items() if text} | {XMP_KEYWORD: _xmp()}


def sheet_metadata(result: GenerationResult) -> dict[str, str]:
    """Text fields for a contact sheet of the whole result: all prompts and seeds, one a line."""
    request = result.request
    fields = {
        "Software": f"gigdiff {gigdiff.__version__}",
        "prompt": "\n".join(dict.fromkeys(request.prompts)),
        "seed": "\n".join(map(str, dict.fromkeys(request.seeds))),
        **_shared(result),
    }
    return {key: text for key, text in fields.items() if text} | {XMP_KEYWORD: _xmp()}


def _shared(result: GenerationResult) -> dict[str, str]:
    request = result.request
    return {
        "model": result.model,
        "weights": result.weights,
        "num_inference_steps": str(request.num_inference_steps or ""),
        "guidance_scale": "" if request.guidance_scale is None else f"{request.guidance_scale:g}",
        "truncation": "" if request.truncation is None else f"{request.truncation:g}",
        "lora": "\n".join(f"{lora} at {scale:g}" for lora, scale in request.adapters()),
        "notes": "\n".join(result.notes),
    }


def read(path: str | Path) -> dict[str, str]:
    """The text fields of a PNG file, XMP packet included."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()  # chunks may follow the pixels
        return {key: str(text) for key, text in getattr(image, "text", {}).items()}


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


def _xmp() -> str:
    """The XMP packet: made by a trained model, with gigdiff."""
    tool = escape(f"gigdiff {gigdiff.__version__}")
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<xmp:CreatorTool>{tool}</xmp:CreatorTool>"
        f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
