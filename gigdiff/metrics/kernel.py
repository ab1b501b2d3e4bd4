"""Kernel distance (KID) between two sets of features, with its standard error.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j),   k(x, y) = (x . y / D + 1)^3

Bińkowski et al., arXiv 1801.01401: unbiased at any number of images, so it may come out below 0, and values at
different counts may be compared. The usual code averages random subsets of 1,000; here all images are used at once,
and the standard error is the jackknife's (Efron & Stein 1981), leaving out one image at a time on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gigdiff.metrics.features import check_features

__all__ = ["LEAST_IMAGES", "KernelDistance", "kernel_distance"]

LEAST_IMAGES = 3  # leaving one out must leave a pair


@dataclass(frozen=True)
class KernelDistance:
    """MMD^2 and its standard error."""

    value: float
    standard_error: float


def kernel_distance(a: np.ndarray, b: np.ndarray) -> KernelDistance:
    """Features (N, D) and (M, D), at least 3 each. Symmetric; 0 in expectation for two draws from one distribution."""
    check_features(a, b, least=LEAST_IMAGES, metric="a kernel distance")
    x, y = a.astype(np.float64), b.astype(np.float64)
    n, m = len(x), len(y)
    within_x, within_y, across = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    np.fill_diagonal(within_x, 0.0)
    np.fill_diagonal(within_y, 0.0)
    sum_x, sum_y, sum_across = within_x.sum(), within_y.sum(), across.sum()
    mean_x, mean_y = sum_x / (n * (n - 1)), sum_y / (m * (m - 1))
    value = mean_x + mean_y - 2 * sum_across / (n * m)
    # The value without image i, from the kernels' row sums.
    without_x = (sum_x - 2 * within_x.sum(axis=1)) / ((n - 1) * (n - 2)) + mean_y
    without_x -= 2 * (sum_across - across.sum(axis=1)) / ((n - 1) * m)
    without_y = (sum_y - 2 * within_y.sum(axis=1)) / ((m - 1) * (m - 2)) + mean_x
    without_y -= 2 * (sum_across - across.sum(axis=0)) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return KernelDistance(float(value), float(np.sqrt(variance)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
