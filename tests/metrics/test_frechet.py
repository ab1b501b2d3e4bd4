"""The Fréchet distance against SciPy's matrix square root and against cases worked out by hand."""

import numpy as np
import pytest

from gigdiff.errors import InputError, NumericalError
from gigdiff.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance


def features(n, d, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale + shift).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(50, 3), (200, 16), (500, 64)])
def test_agrees_with_scipy(n, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(n, d, 1), features(n + 7, d, 2, 1.5, 0.3)
    ours = frechet_distance(feature_statistics(a), feature_statistics(b))
    cov_a, cov_b = np.cov(a.astype(np.float64), rowvar=False), np.cov(b.astype(np.float64), rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    mean = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    assert ours == pytest.approx(mean @ mean + np.trace(cov_a + cov_b - 2 * root), rel=1e-6)


def test_by_hand_in_one_dimension():
    # (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2
    a = FeatureStatistics(10, np.array([1.0]), np.array([[4.0]]))
    b = FeatureStatistics(10, np.array([4.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(9 + 9)


def test_by_hand_diagonal():
    a = FeatureStatistics(10, np.zeros(2), np.diag([1.0, 9.0]))
    b = FeatureStatistics(10, np.array([0.0, 2.0]), np.diag([4.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(4 + 1 + 9)


def test_statistics_are_numpys():
    x = features(40, 5)
    got = feature_statistics(x)
    assert got.n == 40
    np.testing.assert_allclose(got.mean, x.astype(np.float64).mean(0))
    np.testing.assert_allclose(got.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)


def test_fewer_images_than_dimensions():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(20, 60, 1), features(25, 60, 2)
    ours = frechet_distance(feature_statistics(a), feature_statistics(b))
    # The cross term is the nuclear norm of X_a X_b^T of the centred, scaled samples: no square root of a matrix at all.
    xa, xb = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a.astype(np.float64), b.astype(np.float64)))
    cross = linalg.svdvals(xa @ xb.T).sum()
    mean = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    assert ours == pytest.approx(mean @ mean + (xa**2).sum() + (xb**2).sum() - 2 * cross, rel=1e-5)


def test_zero_to_itself_and_exactly_symmetric():
    a, b = feature_statistics(features(100, 32, 1)), feature_statistics(features(90, 32, 2))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6 * np.trace(a.cov))
    assert frechet_distance(a, b) == frechet_distance(b, a) > 0


def test_mode_collapse_and_a_shift_raise_it():
    (
        real,
        other,
    ) = features(300, 16, 1), features(300, 16, 1)[::-1].copy()
    real, other = real[:150], other[:150]
    floor = frechet_distance(feature_statistics(real), feature_statistics(other))
    collapsed = np.repeat(other[:1], 150, axis=0)
    assert frechet_distance(feature_statistics(real), feature_statistics(collapsed)) > 5 * floor
    assert frechet_distance(feature_statistics(real), feature_statistics(other + 3)) > floor + 100


def test_bad_input():
    with pytest.raises(InputError, match="at least 2 images"):
        feature_statistics(np.zeros((1, 4)))
    with pytest.raises(InputError, match="shape"):
        feature_statistics(np.zeros(4))
    with pytest.raises(NumericalError, match="1 of 3"):
        feature_statistics(np.array([[0.0], [np.nan], [1.0]]))
    with pytest.raises(InputError, match="4 and of 5"):
        frechet_distance(feature_statistics(np.ones((3, 4))), feature_statistics(np.ones((3, 5))))
