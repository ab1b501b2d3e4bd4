"""Precision, recall, density, coverage, diversity and the copy test: against prdc, vendi-score and scikit-learn, and
how they move."""

import numpy as np
import pytest

from gigdiff.errors import InputError, NumericalError
from gigdiff.metrics.copies import COPY_RATIO, copy_test
from gigdiff.metrics.diversity import pairwise_diversity, vendi_score
from gigdiff.metrics.manifold import manifold_metrics


def features(n, d, seed=0, scale=1.0, shift=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) * scale + shift).astype(np.float32)


# ---- precision, recall, density, coverage ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d", "k"), [(30, 40, 2, 3), (200, 150, 16, 5), (400, 500, 64, 5)])
def test_manifold_is_prdcs(n, m, d, k):
    prdc = pytest.importorskip("prdc", reason="pip install 'gigdiff[test]'")
    drawn, real = features(n, d, 1, 1.1, 0.1), features(m, d, 2)
    theirs = prdc.compute_prdc(real.astype(np.float64), drawn.astype(np.float64), nearest_k=k)
    ours = manifold_metrics(drawn, real, k)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(ours, name) == pytest.approx(theirs[name], abs=1e-9), name


def test_swapping_the_sets_swaps_precision_and_recall():
    a, b = features(150, 8, 1, 0.7), features(150, 8, 2)
    one, other = manifold_metrics(a, b), manifold_metrics(b, a)
    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert one.precision > one.recall + 0.2  # the narrow set lies inside the wide one


def test_collapse_lowers_recall_and_coverage_and_not_precision():
    """Fails if precision and recall are swapped."""
    real, drawn = features(300, 8, 1), features(300, 8, 2)
    collapsed = drawn[:1] * 0.1 + features(300, 8, 3, 0.01)
    good, bad = manifold_metrics(drawn, real), manifold_metrics(collapsed, real)
    assert bad.precision >= good.precision - 0.05
    assert bad.recall < 0.1 * good.recall and bad.coverage < 0.5 * good.coverage


def test_far_away_and_memorised_images():
    real = features(200, 8, 1)
    assert manifold_metrics(features(200, 8, 2, 1, 30), real) == manifold_metrics(features(200, 8, 3, 1, 40), real)
    assert manifold_metrics(features(200, 8, 2, 1, 30), real).density == 0
    copied = manifold_metrics(real, real)
    assert copied.precision == copied.recall == copied.coverage == 1


def test_one_outlier_moves_precision_more_than_density():
    real, between = features(200, 2, 1), features(200, 2, 2, 0.5, 12)
    before = manifold_metrics(between, real)
    real[0] = 60  # its ball reaches back to all the others
    after = manifold_metrics(between, real)
    assert before.precision == 0 and after.precision > 0.9 and after.density <= 0.21


# ---- diversity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(5, 3), (80, 200), (300, 40)])
def test_vendi_score_is_its_authors(n, d):
    vendi = pytest.importorskip("vendi_score.vendi", reason="pip install 'gigdiff[test]'")
    x = features(n, d, 1, 1.0, 0.5).astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert vendi_score(x) == pytest.approx(vendi.score_K(unit @ unit.T), rel=1e-6)


def test_vendi_score_counts_what_differs():
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.repeat(np.eye(7)[:3], 4, axis=0)) == pytest.approx(3)
    assert vendi_score(np.ones((50, 4))) == pytest.approx(1)
    assert vendi_score(features(1, 4)) == pytest.approx(1)


@pytest.mark.parametrize(("p", "k", "d"), [(1, 2, 3), (6, 4, 20), (3, 10, 100)])
def test_pairwise_diversity_is_scikit_learns(p, k, d):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="pip install 'gigdiff[test]'")
    x = features(p * k, d, 2, 1.0, 0.3).reshape(p, k, d)
    theirs = [pairwise.cosine_distances(one.astype(np.float64))[~np.eye(k, dtype=bool)].mean() for one in x]
    np.testing.assert_allclose(pairwise_diversity(x), theirs, rtol=1e-6)
    np.testing.assert_allclose(pairwise_diversity(np.repeat(x[:, :1], k, axis=1)), 0, atol=1e-6)


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(3, 10, 2), (150, 400, 16), (300, 200, 64)])
def test_copy_test_is_scikit_learns_nearest_neighbours(n, m, d):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="pip install 'gigdiff[test]'")
    drawn, train = features(n, d, 1), features(m, d, 2)
    distance, index = neighbors.NearestNeighbors(n_neighbors=2).fit(train).kneighbors(drawn)
    found = copy_test(drawn, train)
    np.testing.assert_array_equal(found.nearest, index[:, 0])
    np.testing.assert_allclose(found.ratio, distance[:, 0] / distance[:, 1], rtol=1e-4)


def test_copies_are_found_even_of_photos_that_occur_twice():
    train = features(200, 32, 1)
    train[100:] = train[:100] + features(100, 32, 2, 0.01)  # every product has two photos
    groups = [f"product {i % 100}" for i in range(200)]
    memorised, own = train[:50] + features(50, 32, 3, 0.02), features(50, 32, 4)
    assert (copy_test(memorised, train, groups).ratio < COPY_RATIO).all()
    assert (copy_test(own, train, groups).ratio > COPY_RATIO).all()
    assert (copy_test(memorised, train).ratio > 0.1).any()  # without groups the twin hides the copy
    exact = copy_test(train[:7], train, groups)
    np.testing.assert_array_equal(exact.nearest, range(7))
    assert (exact.ratio == 0).all()


def test_bad_input():
    good, holed = features(40, 4), features(40, 4)
    holed[3, 1] = np.nan
    with pytest.raises(InputError, match="with 5 neighbours needs at least 6 images a side, 5 given"):
        manifold_metrics(good[:5], good)
    with pytest.raises(NumericalError, match="1 of 40"):
        manifold_metrics(good, holed)
    with pytest.raises(NumericalError, match="1 of 40"):
        vendi_score(holed)
    with pytest.raises(InputError, match="at least 2 images a prompt"):
        pairwise_diversity(good[:, None])
    with pytest.raises(InputError, match="39 groups for 40"):
        copy_test(good, good, ["a"] * 39)
    with pytest.raises(InputError, match="at least 2 products"):
        copy_test(good, good, ["a"] * 40)
    with pytest.raises(InputError, match="3 and of 4"):
        copy_test(good[:, :3], good)
