"""Generators that draw nothing: they hand out photos. Between them every real generator's scores are read.

A metric that does not tell them apart is broken: photos of the right type from the train split are the best a copying
model can do, shuffled photos have the right mix but heed no prompt, one photo over and over is mode collapse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gigdiff.errors import InputError
from gigdiff.generators.request import Capabilities, GenerationRequest, GenerationResult, validate
from gigdiff.rng import derive_seed

__all__ = ["PhotoGenerator", "shuffled_photos"]


class PhotoGenerator:
    """An ImageGenerator that picks one of the photos listed for the prompt, by the image's seed.

    Args:
        name: goes into the report.
        photos: prompt -> uint8 (N, H, W, 3), N at least 1, all of one H and W.
    """

    folder: Path | None = None

    def __init__(self, name: str, photos: Mapping[str, np.ndarray]) -> None:
        if not photos or any(len(choices) == 0 for choices in photos.values()):
            raise InputError(f"{name} got no photos, or none for a prompt; give at least one a prompt")
        self.name = name
        self.photos = photos
        height, width = next(iter(photos.values())).shape[1:3]
        self.capabilities = Capabilities(default_size=(height, width), sizes=((height, width),), max_steps=1)

    def generate(
        self, request: GenerationRequest, *, on_step: Callable[[int, int], None] | None = None
    ) -> GenerationResult:
        """uint8 (N, H, W, 3); a prompt it has no photos for is an InputError."""
        request = validate(request, self.capabilities, self.name)
        images = []
        for prompt, seed in zip(request.prompts, request.seeds, strict=True):
            if prompt not in self.photos:
                raise InputError(f'{self.name} has no photo for the prompt "{prompt}"')
            choices = self.photos[prompt]
            images.append(choices[derive_seed(seed, "photo") % len(choices)])
        if on_step is not None:
            on_step(1, 1)
        return GenerationResult(np.stack(images), request, self.name, 0.0)


def shuffled_photos(prompts: Sequence[str], images: np.ndarray, seed: int = 0) -> PhotoGenerator:
    """The photos themselves, each handed out for another's prompt."""
    order = np.random.default_rng(derive_seed(seed, "control:shuffled")).permutation(len(images))
    chosen: dict[str, list[int]] = {}
    for prompt, i in zip(prompts, order, strict=True):  # a prompt that occurs twice has two photos to pick from
        chosen.setdefault(prompt, []).append(int(i))
    return PhotoGenerator("control:shuffled", {prompt: images[rows] for prompt, rows in chosen.items()})
