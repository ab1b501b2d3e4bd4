"""Lab conversion against scikit-image, and what the histogram must tell apart."""

import numpy as np
import pytest
import torch

from gigdiff.metrics.colour import ColourHistogram, srgb_to_lab


def product(colour, background=(255, 255, 255), n=1):
    images = np.empty((n, 80, 64, 3), np.uint8)
    images[:] = background
    images[:, 20:60, 16:48] = colour
    return images


def test_lab_is_scikit_images():
    color = pytest.importorskip("skimage.color", reason="pip install 'gigdiff[eval]'")
    rgb = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    ours = srgb_to_lab(torch.from_numpy(rgb).double()).numpy()
    np.testing.assert_allclose(ours, color.rgb2lab(rgb[None])[0], atol=0.02)
    np.testing.assert_allclose(srgb_to_lab(torch.tensor([255.0, 255, 255])).numpy(), [100, 0, 0], atol=1e-3)


def test_histograms_sum_to_one_and_background_does_not_count():
    extractor = ColourHistogram()
    got = extractor(product((200, 20, 20)))
    half = (extractor.dim - 1) // 2
    assert got.shape == (1, extractor.dim) and got.dtype == np.float32
    assert (got[0, :half] ** 2).sum() == pytest.approx(1, abs=0.01)
    assert (got[0, half:-1] ** 2).sum() == pytest.approx(1, abs=0.01)
    assert got[0, -1] == pytest.approx(0.25, abs=0.03)  # a quarter of the picture is product
    assert np.isfinite(extractor(product((255, 255, 255)))).all()


def test_colours_part_and_position_hardly_matters():
    extractor = ColourHistogram()
    red, blue, moved = (extractor(x)[0] for x in (
        product((200, 20, 20)), product((20, 20, 200)), np.roll(product((200, 20, 20)), 4, axis=2)))  # fmt: skip
    assert np.linalg.norm(red - blue) > 5 * np.linalg.norm(red - moved)
