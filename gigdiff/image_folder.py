"""A folder of pictures made by anything: pixels, file names and, where they are written down, the prompts.

A prompt is taken from metadata.jsonl in the folder (file_name, and prompt, text or caption), else from the PNG's own
"prompt" text, which gigdiff and many other tools write.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gigdiff.errors import DataError, InputError
from gigdiff.images import fit_image, to_rgb
from gigdiff.products import Product
from gigdiff.prompt_sets import Asked

__all__ = ["ImageFolder", "read_images"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
METADATA = "metadata.jsonl"
PROMPT_KEYS = ("prompt", "text", "caption")


@dataclass(frozen=True)
class ImageFolder:
    """Pictures in the order of their names: uint8 (N, H, W, 3), names, and prompts ("" where there is none)."""

    images: np.ndarray
    names: tuple[str, ...]
    prompts: tuple[str, ...]

    def asked(self) -> list[Asked] | None:
        """What each prompt asks for, as far as it can be read; None when no picture has a prompt."""
        if not any(self.prompts):
            return None
        products = [Product.from_prompt(prompt) if prompt else Product() for prompt in self.prompts]
        return [Asked(*one) for one in zip(self.names, self.prompts, products, strict=True)]


def read_images(folder: str | Path, fit: tuple[int, int] | None = None) -> ImageFolder:
    """Reads all pictures of a folder (not of its subfolders).

    Args:
        fit: bring every picture into a white frame of (height, width); without it all must have one size.

    Raises:
        InputError: no such folder. DataError: no pictures, a broken one, sizes that differ, or bad metadata.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the folder that holds the pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}); subfolders are not searched")
    written = _metadata(folder)
    pixels, prompts = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                pixels.append(fit_image(image, *fit) if fit else np.asarray(to_rgb(image)))
                prompts.append(written.get(path.name) or str(getattr(image, "text", {}).get("prompt", "")).strip())
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} can't be read as a picture ({error}); replace or remove it") from error
    sizes = Counter(one.shape[:2] for one in pixels)
    if len(sizes) > 1:
        found = ", ".join(f"{h} x {w} ({count} files)" for (h, w), count in sizes.most_common(5))
        raise DataError(
            f"{folder} holds pictures of {len(sizes)} sizes (height x width): {found}; a resize would be part of the "
            "score: bring them to one size yourself, or pass --fit to have each fitted into the frame"
        )
    return ImageFolder(np.stack(pixels), tuple(path.name for path in paths), tuple(prompts))


def _metadata(folder: Path) -> dict[str, str]:
    """File name -> prompt; empty where there is no metadata.jsonl."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    prompts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"]
            prompt = next(row[key] for key in PROMPT_KEYS if key in row)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(
                f'{path}, line {number}: a JSON object with "file_name" and one of {", ".join(PROMPT_KEYS)} is needed'
            ) from error
        prompts[str(name)] = str(prompt).strip()
    return prompts
