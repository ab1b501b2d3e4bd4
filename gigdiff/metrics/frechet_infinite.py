"""The Fréchet distance that infinitely many generated images would have, by extrapolation.

    d(N) = d_inf + slope / N      fitted by least squares over subsets of N images, read off at 1 / N = 0

Chong & Forsyth, arXiv 1911.07023, eq. 4 and section 4: the distance of N images is biased upwards by about slope / N,
and the slope differs from model to model, so that two models may change places with N. As in the paper only the
generated side is extrapolated; the real photos stay as they are, and their own bias stays in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gigdiff.errors import InputError
from gigdiff.metrics.frechet import FeatureStatistics, feature_statistics
from gigdiff.rng import derive_seed

__all__ = ["LEAST_IMAGES", "Extrapolation", "frechet_distance_infinite"]

POINTS = 8
LEAST_IMAGES = 4 * POINTS


@dataclass(frozen=True)
class Extrapolation:
    """The fitted line: value at infinitely many images, slope, and the (counts, distances) it was fitted to."""

    value: float
    slope: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_distance_infinite(features: np.ndarray, real: FeatureStatistics, *, seed: int = 0) -> Extrapolation:
    """Features (N, D) of generated images, N at least 32, against the statistics of real photos.

    Eight subsets, of N / 2 to N images evenly spaced, each drawn afresh without replacement (the paper: 15, of 5,000
    to 50,000). The value may come out below 0 where the true distance is near it.
    """
    if len(features) < LEAST_IMAGES:
        raise InputError(f"extrapolating needs at least {LEAST_IMAGES} images, {len(features)} given; raise --count")
    statistics = feature_statistics(features)  # checks them
    if statistics.mean.shape != real.mean.shape:
        raise InputError(
            f"features of {statistics.mean.size} and of {real.mean.size} dimensions can't be compared; "
            "use one extractor for both"
        )
    values, vectors = np.linalg.eigh(real.cov)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    counts = np.linspace(len(features) / 2, len(features), POINTS).astype(int)
    distances = []
    for k, count in enumerate(counts):
        rng = np.random.default_rng(derive_seed(seed, "frechet_distance_infinite", k))
        subset = features[rng.permutation(len(features))[:count]].astype(np.float64)
        distances.append(_distance(subset, real, root))
    slope, value = np.polyfit(1.0 / counts, distances, 1)
    return Extrapolation(float(value), float(slope), tuple(map(int, counts)), tuple(distances))


def _distance(x: np.ndarray, real: FeatureStatistics, root: np.ndarray) -> float:
    """`frechet_distance` with the real side's square root at hand.

    tr (S_A S_B)^(1/2) is the sum of the singular values of X_A S_B^(1/2), X_A the centred features over sqrt(N - 1):
    their squares are the eigenvalues of its Gram matrix on the smaller side.
    """
    mean = x.mean(axis=0)
    x = (x - mean) / np.sqrt(len(x) - 1)
    product = x @ root
    gram = product @ product.T if len(x) <= x.shape[1] else product.T @ product
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None)).sum()
    return float(np.sum((mean - real.mean) ** 2) + np.sum(x**2) + np.trace(real.cov) - 2.0 * cross)
