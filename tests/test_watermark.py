from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gigdiff.errors import InputError
from gigdiff.watermark import THRESHOLD, detect, embed


def product(seed: int, height: int = 320, width: int = 256) -> Image.Image:
    """A smooth, shaded product on pure white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    inside = (x / 0.75) ** 4 + (y / 0.8) ** 4 < 1
    shade = 20 * np.sin(3 * x + rng.random()) * np.cos(4 * y)
    pixels = np.full((height, width, 3), 255.0)
    pixels[inside] = (rng.integers(40, 200, 3) + shade[..., None])[inside]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def test_it_is_found_after_jpeg_and_resizing_and_only_where_it_is():
    for seed in range(3):
        plain = product(seed)
        marked = embed(plain)
        assert detect(plain) < THRESHOLD
        assert detect(marked) > 2 * THRESHOLD
        for changed in (jpeg(marked, 75), resized(marked, 0.9), resized(marked, 1.1)):
            assert detect(changed) > THRESHOLD


def test_white_stays_white_and_the_rest_changes_little():
    plain = product(0)
    before, after = np.asarray(plain).astype(int), np.asarray(embed(plain)).astype(int)
    white = (before == 255).all(-1)
    assert white.any() and (after[white] == 255).all()
    assert 1 < np.abs(after - before)[~white].mean() < 4


def test_the_same_every_time_with_metadata_kept():
    plain = product(1)
    plain.info["prompt"] = "coat"
    assert embed(plain).tobytes() == embed(plain).tobytes() and embed(plain).info == {"prompt": "coat"}
    assert embed(plain, strength=0).tobytes() == plain.tobytes()


def test_small_and_blank_pictures_and_bad_arguments():
    assert detect(embed(product(2, 80, 64))) > THRESHOLD
    assert detect(np.full((80, 64, 3), 255, np.uint8)) == 0.0
    with pytest.raises(InputError, match="too small"):
        embed(np.zeros((40, 64, 3), np.uint8))
    with pytest.raises(InputError, match="strength=9"):
        embed(product(0), strength=9)
