"""CLIP score: how well an image fits its prompt, to CLIP.

    score = 100 max(cos(image, text), 0)

Hessel et al., arXiv 2104.08718, eq. 1, with torchmetrics' weight of 100 in place of 2.5. CLIP reads at most 77 tokens
and is half blind to counts and small parts; the attribute scores say more of product photos.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gigdiff.errors import InputError
from gigdiff.metrics.vision import ClipFeatures

__all__ = ["clip_score"]


def clip_score(clip: ClipFeatures, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """uint8 (N, H, W, 3) and a prompt each -> float64 (N,), in [0, 100]."""
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} images and {len(prompts)} prompts were given; one an image is needed")
    x, y = clip(images).astype(np.float64), clip.texts(list(prompts)).astype(np.float64)
    cosine = (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return 100.0 * np.maximum(cosine, 0.0)
