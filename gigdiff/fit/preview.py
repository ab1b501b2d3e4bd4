"""What a run draws on the way: the same prompts and seeds each time, through the code that `gigdiff.generate` runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gigdiff.generators.request import GenerationRequest, ImageGenerator
from gigdiff.images import contact_sheet, save_image

__all__ = ["save_preview"]

AT_ONCE = 48  # images


def save_preview(generator: ImageGenerator, prompts: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw every prompt with every seed and write them all on one sheet, 12 in a row; an older file is replaced."""
    texts = tuple(prompt for prompt in prompts for _ in seeds)
    own = tuple(seeds) * len(prompts)
    images = []
    for start in range(0, len(texts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        images += list(generator.generate(GenerationRequest(texts[part], own[part])).images)
    metadata = {"prompts": json.dumps(tuple(prompts)), "seeds": ", ".join(map(str, seeds)) + " each"}
    save_image(path, contact_sheet(images, 12, labels=texts, scale=2), metadata, overwrite=True)
