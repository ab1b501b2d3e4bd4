"""Pictures between files, uint8 arrays and model tensors; nothing else converts value ranges, resizes, pads or saves.

    PIL image --fit_image--> uint8 HWC --stack, to_model--> float32 NCHW in [-1, 1] --model--> --to_uint8--> uint8 NHWC

Outside the models a picture is uint8, RGB, height x width x channels; inside it is float32 in [-1, 1], channels first.
torch is imported inside the functions that need it, so that `import gigdiff.images` stays cheap.
"""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from gigdiff import xmp
from gigdiff.errors import InputError, NumericalError, OutputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMATS",
    "XMP_KEYWORD",
    "check_writable",
    "contact_sheet",
    "fit_image",
    "fitted_box",
    "save_image",
    "to_model",
    "to_pil",
    "to_rgb",
    "to_uint8",
]

#: What is written, by the file name's end.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
XMP_KEYWORD = "XML:com.adobe.xmp"  # where the PNG and XMP specifications put the packet in a PNG

WHITE = (255, 255, 255)

# A photo within 5% of the frame is padded and not resampled: resampling by a pixel or two only blurs.
RESAMPLE_FROM = 1.05


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright, on white, from any PIL mode: grey, 16 bit, palette, CMYK, transparent, EXIF-rotated."""
    image = ImageOps.exif_transpose(image) or image
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "F"):
        values = np.asarray(image, dtype=np.float64)
        # Pillow clips these modes at 255, which turns a 16-bit photo white.
        scale = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray(np.rint(values.clip(0, scale) * (255.0 / scale)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGB", image.size, WHITE)
        ground.paste(rgba, mask=rgba.getchannel("A"))
        return ground
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The whole picture inside a white frame.

    The aspect ratio is kept, the resize is antialiased (Lanczos), the picture is centred. One that already fills the
    frame to within 5% is not resampled, so a photo of 80 x 60 (height x width) put into 80 x 64 keeps its pixels and
    gets two white columns on either side.

    Args:
        image: any PIL mode; see `to_rgb`.
        height, width: of the frame, at least 1.

    Returns:
        uint8 (height, width, 3).
    """
    if height < 1 or width < 1:
        raise InputError(f"fit_image got height={height}, width={width}; both must be at least 1.")
    image = to_rgb(image)
    left, top, right, bottom = fitted_box(image.size, height, width)
    if image.size != (right - left, bottom - top):
        image = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if image.size == (width, height):
        return np.array(image, dtype=np.uint8)
    frame = Image.new("RGB", (width, height), WHITE)
    frame.paste(image, (left, top))
    return np.array(frame, dtype=np.uint8)


def fitted_box(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Where `fit_image` puts a picture of `size` (width, height): (left, top, right, bottom) inside the frame."""
    scale = min(height / size[1], width / size[0])
    if 1.0 <= scale < RESAMPLE_FROM:
        inner = size
    else:
        inner = (max(1, min(width, round(size[0] * scale))), max(1, min(height, round(size[1] * scale))))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def to_model(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [-1, 1]; 0 becomes -1, 255 becomes 1. Keeps a tensor's device."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    if tensor.dtype != torch.uint8 or tensor.ndim != 4:
        raise InputError(f"to_model takes uint8 (N, H, W, C), got {tensor.dtype} of shape {tuple(tensor.shape)}.")
    return tensor.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Float (N, C, H, W), nominally in [-1, 1], to uint8 (N, H, W, C); values outside are clipped, then rounded.

    Inverse of `to_model`, exactly.

    Raises:
        NumericalError: on NaN or infinity, which clipping would turn into a black picture without a word.
    """
    import torch

    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"to_uint8 takes float (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}.")
    images = images.detach().float()
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not bool(finite.all()):
        broken = [i for i, good in enumerate(finite.tolist()) if not good]
        raise NumericalError(
            f"image {', '.join(map(str, broken))} of {len(finite)} came out of the model with NaN or infinite values. "
            "Nothing was saved. Load the model with dtype=float32 (half precision overflows in some autoencoders), "
            "lower guidance_scale, or check the weights."
        )
    scaled = images.clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) to an RGB PIL image of its own memory."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"to_pil takes uint8 (H, W, 3), got {image.dtype} of shape {image.shape}.")
    return Image.fromarray(image.copy())


def contact_sheet(
    images: Sequence[Image.Image | np.ndarray],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    gap: int = 4,
    scale: int = 1,
) -> Image.Image:
    """All pictures on one white sheet, row by row, each with its label below.

    Args:
        images: PIL images or uint8 (H, W, 3); they may differ in size, the largest sets the cell.
        columns: pictures in a row, at least 1.
        labels: one a picture, wrapped to two lines and cut with dots where the cell is too narrow.
        gap: white pixels around each cell.
        scale: whole-number enlargement without smoothing, to see the pixels as they are.
    """
    if not images:
        raise InputError("contact_sheet got no images; give at least one.")
    if columns < 1 or scale < 1:
        raise InputError(f"contact_sheet got columns={columns}, scale={scale}; both must be at least 1.")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"contact_sheet got {len(labels)} labels for {len(images)} images; give one each.")
    pictures = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    if scale > 1:
        nearest = Image.Resampling.NEAREST
        pictures = [picture.resize((picture.width * scale, picture.height * scale), nearest) for picture in pictures]

    cell_width, cell_height = max(p.width for p in pictures), max(p.height for p in pictures)
    font, line_height = ImageFont.load_default(size=10), 12
    texts = [_wrap(label, cell_width, font) for label in labels] if labels is not None else [[] for _ in pictures]
    text_height = line_height * max(map(len, texts))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (gap + columns * (cell_width + gap), gap + rows * (cell_height + text_height + gap)), WHITE
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x = gap + (i % columns) * (cell_width + gap)
        y = gap + (i // columns) * (cell_height + text_height + gap)
        sheet.paste(picture.convert("RGB"), (x + (cell_width - picture.width) // 2, y))
        for n, line in enumerate(lines):
            draw.text((x, y + cell_height + n * line_height), line, fill=(64, 64, 64), font=font)
    return sheet


def _wrap(text: str, width: int, font: Any, max_lines: int = 2) -> list[str]:
    """The label in at most `max_lines` lines of at most `width` pixels (judged by the font's average letter)."""
    letters = max(4, int(width / (font.getlength("abcdefghij") / 10)))
    # Pillow's built-in font has ASCII only; "é" is drawn as "e", what has no such form as "?", never as an empty box.
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if not unicodedata.combining(c)).encode("ascii", "replace").decode()
    return textwrap.wrap(text, width=letters, max_lines=max_lines, placeholder="...") or [""]


def check_writable(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Raises now what `save_image` would raise later, so that no time is spent on a picture that can't be saved.

    Makes the parent folder.

    Raises:
        InputError: a file type that is not in FORMATS.
        OutputError: the file exists and `overwrite` is off, or the folder can't be made or written to.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f'can\'t save "{path}": the name must end in one of {", ".join(FORMATS)}.')
    try:
        if path.is_dir():
            raise OutputError(f'"{path}" is a folder; name a file to write.')
        if path.exists() and not overwrite:
            raise OutputError(f'"{path}" exists already; pass --overwrite (overwrite=True) or choose another name.')
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f'can\'t make the folder "{path.parent}": a file is in the way.') from error
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f'can\'t make the folder "{path.parent}": {reason}; choose another folder.') from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f'can\'t write to "{path.parent}": permission denied; choose another folder.')
    return path


def save_image(
    path: str | os.PathLike[str],
    image: Image.Image | np.ndarray,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    quality: int = 92,
) -> Path:
    """Writes a PNG, JPEG or WebP with its metadata, under a temporary name first, so that such a file is always whole.

    Every format carries the fields as one XMP packet. A PNG has each as an iTXt chunk too; JPEG and WebP have the
    prompt and settings as EXIF's UserComment, where other image generators put them. A JPEG holds 64 kB of XMP; longer
    fields are cut and named in "cut".

    Args:
        path: ends in .png, .jpg, .jpeg or .webp; its folder is made where missing.
        image: PIL image or uint8 (H, W, 3).
        metadata: field -> text (`gigdiff.provenance` makes them).
        overwrite: replace an existing file.
        quality: of JPEG (without colour subsampling, which blurs coloured edges) and WebP, 1 to 100.

    Raises:
        InputError, OutputError: as `check_writable`; OutputError also when the disk is full.
    """
    path = check_writable(path, overwrite)
    if not 1 <= quality <= 100:
        raise InputError(f"quality={quality} is out of range; allowed are 1 to 100.")
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    form = FORMATS[path.suffix.lower()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                picture.save(file, format=form, **_options(form, dict(metadata or {}), quality))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f'can\'t write "{path}": {error.strerror or error}.') from error
    return path


def _options(form: str, fields: dict[str, str], quality: int) -> dict[str, Any]:
    """Pillow's keywords for saving: compression and metadata."""
    packet = fields.pop(XMP_KEYWORD, None)
    if form == "PNG":
        info = PngInfo()
        for keyword, text in fields.items():
            info.add_itxt(keyword, text)
        if packet is not None:
            info.add_itxt(XMP_KEYWORD, packet)
        return {"pnginfo": info}
    options: dict[str, Any] = {"quality": quality}
    options |= {"subsampling": 0, "optimize": True} if form == "JPEG" else {"method": 4}
    if packet is None and fields:
        packet = xmp.packet(fields)
    if packet is not None:
        if form == "JPEG" and len(packet.encode()) > xmp.JPEG_LIMIT:
            packet = xmp.packet(xmp.shortened(fields))
        options["xmp"] = packet.encode()
    if fields:
        options["exif"] = _exif(fields)
    return options


def _exif(fields: Mapping[str, str]) -> bytes:
    """EXIF with Software and, in UserComment, prompt and settings in the layout that other generators settled on."""
    exif = Image.Exif()
    exif[0x0131] = fields.get("Software", "gigdiff")
    settings = ", ".join(f"{key}: {text}" for key, text in fields.items() if key not in ("prompt", "negative_prompt"))
    lines = [fields.get("prompt", ""), f"Negative prompt: {fields.get('negative_prompt', '')}", settings]
    comment = "\n".join(lines)[:10_000]  # a segment holds 64 kB; the packet has the whole text
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + comment.encode("utf-16-be", errors="replace")
    return exif.tobytes()
