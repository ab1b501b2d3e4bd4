"""Fréchet distance between two sets of features, each taken as a Gaussian.

    d^2(A, B) = |mu_A - mu_B|^2 + tr(S_A + S_B - 2 (S_A S_B)^(1/2))

Dowson & Landau 1982; with Inception features this is the FID of Heusel et al. (arXiv 1706.08500). Here it is taken over
any extractor's features, so a value means something only beside the extractor's name and the sample counts: with fewer
samples it is larger, whatever the images (arXiv 1911.07023). Compare it with real against real at the same count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gigdiff.errors import InputError, NumericalError

__all__ = ["FeatureStatistics", "feature_statistics", "frechet_distance"]


@dataclass(frozen=True)
class FeatureStatistics:
    """What the distance needs to know of a set of features: n, mean float64 (D,), cov float64 (D, D), unbiased."""

    n: int
    mean: np.ndarray
    cov: np.ndarray


def feature_statistics(features: np.ndarray) -> FeatureStatistics:
    """Features (N, D), N at least 2, finite -> their mean and unbiased (N - 1) covariance in float64."""
    if features.ndim != 2:
        raise InputError(f"features have shape {features.shape}; (N, D) is needed")
    if len(features) < 2:
        raise InputError(f"a Fréchet distance needs at least 2 images a side, {len(features)} given; raise --count")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise NumericalError(f"{bad} of {len(features)} feature vectors hold NaN or infinity; check the images")
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    return FeatureStatistics(len(x), mean, (x.T @ x) / (len(x) - 1))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared Fréchet distance d^2, at least 0 (as every FID is reported). Symmetric.

    tr (S_A S_B)^(1/2) is the sum of the square roots of the eigenvalues of S_A^(1/2) S_B S_A^(1/2), which is symmetric
    and positive semidefinite. So singular covariances (fewer images than dimensions) need neither scipy's sqrtm,
    which goes complex on them, nor a multiple of the identity added to them.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"features of {a.mean.size} and of {b.mean.size} dimensions can't be compared; use one extractor for both"
        )
    # Of two orders that are equal in exact arithmetic take one that does not depend on the arguments' order.
    first, second = (a, b) if np.trace(a.cov) <= np.trace(b.cov) else (b, a)
    values, vectors = np.linalg.eigh(first.cov)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = root @ second.cov @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2.0), 0.0, None)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross
    if not np.isfinite(distance):
        raise NumericalError("the Fréchet distance came out as NaN or infinite; check the statistics given")
    return float(max(distance, 0.0))
