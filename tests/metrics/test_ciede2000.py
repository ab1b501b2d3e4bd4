"""CIEDE2000 against colour-science and scikit-image, and the pairs that its paper prints to catch wrong hue means."""

import numpy as np
import pytest

from gigdiff.metrics.ciede2000 import ciede2000

# Sharma, Wu & Dalal 2005, table 1, rows 1, 4, 7, 8, 13, 16, 20, 24, 25
PRINTED = [
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, -1, 2), (50, 0, 0), 2.3669),
    ((50, -0.001, 2.49), (50, 0.0009, -2.49), 4.8045),
    ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (58, 24, 15), 19.4535),
    ((50, 2.5, 0), (50, 3.2592, 0.335), 1.0000),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
]


@pytest.mark.parametrize(("one", "other", "printed"), PRINTED)
def test_the_papers_pairs(one, other, printed):
    assert ciede2000(np.array(one), np.array(other)) == pytest.approx(printed, abs=5e-5)


@pytest.mark.parametrize("n", [10, 1000, 20000])
def test_agrees_with_colour_science_and_scikit_image(n):
    rng = np.random.default_rng(n)
    one, other = (rng.uniform((0, -100, -100), (100, 100, 100), (n, 3)) for _ in range(2))
    ours = ciede2000(one, other)
    colour = pytest.importorskip("colour", reason="pip install 'gigdiff[test]'")
    np.testing.assert_allclose(ours, colour.delta_E(one, other, method="CIE 2000"), rtol=1e-4, atol=1e-6)
    skimage = pytest.importorskip("skimage.color", reason="pip install 'gigdiff[eval]'")
    np.testing.assert_allclose(ours, skimage.deltaE_ciede2000(one, other), rtol=1e-4, atol=1e-6)


def test_symmetric_zero_to_itself_and_broadcast():
    rng = np.random.default_rng(0)
    one, other = (rng.uniform((0, -60, -60), (100, 60, 60), (50, 3)) for _ in range(2))
    np.testing.assert_allclose(ciede2000(one, other), ciede2000(other, one), rtol=1e-12)
    assert (ciede2000(one, one) == 0).all()
    assert ciede2000(one[:, None], other[None]).shape == (50, 50)
