"""Kernel distance, extrapolated Fréchet distance and Inception Score: against torchmetrics and scikit-learn, and how
they move."""

import numpy as np
import pytest
import torch

from gigdiff.errors import InputError, NumericalError
from gigdiff.metrics.frechet import feature_statistics, frechet_distance
from gigdiff.metrics.frechet_infinite import frechet_distance_infinite
from gigdiff.metrics.inception_score import inception_score
from gigdiff.metrics.kernel import kernel_distance


def features(n, d, seed=0, scale=1.0, shift=0.0):
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return (np.random.default_rng(seed).normal(size=(n, d)) @ mix * scale + shift).astype(np.float32)


class PassThrough(torch.nn.Module):
    """torchmetrics hands its "images" to a feature network; here they are the features already."""

    def __init__(self, size):
        super().__init__()
        self.num_features = size

    def forward(self, x):
        return x


# ---- kernel distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(20, 20, 4), (150, 150, 32), (300, 300, 128)])
def test_kernel_distance_is_torchmetrics(n, m, d):
    kid = pytest.importorskip("torchmetrics.image.kid", reason="pip install 'gigdiff[test]'")
    a, b = features(n, d, 1), features(m, d, 2, 1.2, 0.1)
    # One subset of everything: the order that it draws does not matter then.
    theirs = kid.KernelInceptionDistance(feature=PassThrough(d), subsets=1, subset_size=n)
    theirs.update(torch.from_numpy(a).double(), real=True)
    theirs.update(torch.from_numpy(b).double(), real=False)
    assert kernel_distance(a, b).value == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


@pytest.mark.parametrize(("n", "m"), [(12, 9), (40, 60)])
def test_the_standard_error_is_the_jackknife_done_by_hand(n, m):
    a, b = features(n, 6, 1), features(m, 6, 2, 1.3)
    left = np.array([kernel_distance(np.delete(a, i, 0), b).value for i in range(n)])
    right = np.array([kernel_distance(a, np.delete(b, i, 0)).value for i in range(m)])
    variance = (n - 1) * left.var() + (m - 1) * right.var()
    assert kernel_distance(a, b).standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_the_standard_error_is_what_repeated_draws_show():
    values, errors = zip(
        *((k.value, k.standard_error) for k in (
            kernel_distance(features(100, 8, 2 * i), features(100, 8, 2 * i + 1, 1.2)) for i in range(60))),
        strict=True,
    )  # fmt: skip
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_kernel_distance_is_symmetric_unbiased_and_sees_collapse():
    a, b = features(80, 16, 1), features(120, 16, 2)
    assert kernel_distance(a, b).value == pytest.approx(kernel_distance(b, a).value, rel=1e-9)
    same = [kernel_distance(features(50, 16, 2 * i), features(50, 16, 2 * i + 1)) for i in range(40)]
    mean, error = np.mean([k.value for k in same]), np.mean([k.standard_error for k in same])
    assert abs(mean) < 3 * error / np.sqrt(len(same))
    collapsed = kernel_distance(a, np.repeat(b[:1], 80, axis=0))
    assert collapsed.value > 5 * collapsed.standard_error + kernel_distance(a, b).value


# ---- extrapolated Fréchet distance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(40, 3), (200, 16), (150, 200)])
def test_extrapolation_is_the_plain_distance_and_scikit_learns_line(n, d):
    linear = pytest.importorskip("sklearn.linear_model", reason="pip install 'gigdiff[test]'")
    fid = pytest.importorskip("torchmetrics.image.fid", reason="pip install 'gigdiff[test]'")
    a, real = features(n, d, 1, 1.2), features(2 * d + 50, d, 2)
    found = frechet_distance_infinite(a, feature_statistics(real))
    assert found.counts[0] == n // 2 and found.counts[-1] == n
    whole = frechet_distance(feature_statistics(a), feature_statistics(real))
    assert found.distances[-1] == pytest.approx(whole, rel=1e-5)
    if n > d:
        theirs = fid.FrechetInceptionDistance(feature=PassThrough(d)).set_dtype(torch.float64)
        theirs.update(torch.from_numpy(a).double(), real=False)
        theirs.update(torch.from_numpy(real).double(), real=True)
        assert found.distances[-1] == pytest.approx(float(theirs.compute()), rel=1e-4)
    line = linear.LinearRegression().fit(1 / np.array(found.counts)[:, None], found.distances)
    assert (found.value, found.slope) == pytest.approx((line.intercept_, line.coef_[0]), rel=1e-6)
    assert frechet_distance_infinite(a, feature_statistics(real)) == found


def test_extrapolation_comes_nearer_to_the_truth():
    """Two Gaussians whose distance is known: d (1.5 - 1)^2 for covariances I and 2.25 I."""
    d, rng = 16, np.random.default_rng(5)
    truth = feature_statistics(rng.normal(size=(200_000, d)) * 1.5)
    plain, infinite = [], []
    for _ in range(5):
        x = rng.normal(size=(160, d))
        plain.append(frechet_distance(feature_statistics(x), truth))
        infinite.append(frechet_distance_infinite(x, truth).value)
    assert abs(np.mean(infinite) - d * 0.25) < 0.6 * abs(np.mean(plain) - d * 0.25)


# ---- Inception Score -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "classes"), [(12, 3), (100, 10), (400, 88)])
def test_inception_score_is_torchmetrics(n, classes):
    module = pytest.importorskip("torchmetrics.image.inception", reason="pip install 'gigdiff[test]'")
    logits = torch.from_numpy(features(n, classes, 3, 3.0)).double()
    theirs = module.InceptionScore(feature=PassThrough(classes), splits=1)
    theirs.update(logits)
    ours, deviation = inception_score(logits.log_softmax(1).numpy())
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
    assert deviation == 0.0


def test_inception_score_moves_as_it_should():
    sure = np.log(np.full((40, 4), 1e-9) + np.tile(np.eye(4), (10, 1)))
    assert inception_score(sure)[0] == pytest.approx(4, rel=1e-3)  # clear, and all four
    assert inception_score(np.log(np.full((40, 4), 0.25)))[0] == pytest.approx(1)  # unclear
    assert inception_score(sure[::4])[0] == pytest.approx(1, rel=1e-3)  # mode collapse
    parts = inception_score(sure, splits=10)
    assert parts[0] == pytest.approx(4, rel=1e-3) and parts[1] == pytest.approx(0, abs=1e-6)
    never = np.where(np.eye(4) > 0, 0.0, -np.inf)
    assert inception_score(never)[0] == pytest.approx(4)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input():
    good, holed = features(40, 4), features(40, 4)
    holed[3, 1] = np.nan
    with pytest.raises(InputError, match="at least 3 images a side, 2 given"):
        kernel_distance(good, good[:2])
    with pytest.raises(NumericalError, match="1 of 40 feature vectors"):
        kernel_distance(good, holed)
    with pytest.raises(InputError, match="4 and of 3 dimensions"):
        kernel_distance(good, good[:, :3])
    with pytest.raises(InputError, match="at least 32 images, 31 given"):
        frechet_distance_infinite(good[:31], feature_statistics(good))
    with pytest.raises(NumericalError, match="1 of 40"):
        frechet_distance_infinite(holed, feature_statistics(good))
    with pytest.raises(InputError, match="4 and of 3"):
        frechet_distance_infinite(good, feature_statistics(good[:, :3]))
    with pytest.raises(InputError, match="over 11 parts needs as many images, 10"):
        inception_score(good[:10], splits=11)
    with pytest.raises(NumericalError, match="NaN"):
        inception_score(holed)
