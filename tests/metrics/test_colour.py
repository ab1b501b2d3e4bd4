"""Lab conversion against scikit-image, and what the histogram must tell apart."""

import numpy as np
import pytest
import torch

from gigdiff.errors import InputError
from gigdiff.metrics.colour import ColourHistogram, srgb_to_lab
from gigdiff.metrics.colour_difference import colour_difference


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


def test_colour_difference_is_small_for_the_colour_asked_for():
    red, white = product((205, 20, 35), n=2), np.full((1, 80, 64, 3), 255, np.uint8)
    assert colour_difference(red, ["Red", "red"]).max() < 2
    right, wrong, near = colour_difference(np.repeat(red[:1], 3, axis=0), ["Red", "Teal", "Maroon"])
    assert right < near < wrong and wrong > 40
    assert colour_difference(white, ["White"])[0] < 1 < 50 < colour_difference(white, ["Black"])[0]
    assert np.isnan(colour_difference(np.repeat(red[:1], 3, axis=0), ["Multi", None, "no colour"])).all()
    with pytest.raises(InputError, match="2 images and 1 colours"):
        colour_difference(red, ["Red"])


def test_a_quarter_of_the_product_in_the_colour_is_enough():
    image = product((60, 60, 60))
    image[:, 20:60, 26:38] = (205, 20, 35)  # a red stripe down the middle
    assert colour_difference(image, ["Red"])[0] < 3
