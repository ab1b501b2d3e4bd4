"""Variety: among the images of one prompt, and in the whole set.

    pairwise diversity = mean over pairs of one prompt's images of (1 - cosine of their features), in [0, 2]
    Vendi score        = exp( - sum_i l_i log l_i ),  l_i the eigenvalues of K / N, K_ij = cosine of i and j

Friedman & Dieng, arXiv 2210.02410, eq. 2: the Vendi score is the effective number of different images, 1 when all are
alike, N when no two have anything in common. It grows with N: compare it at one count, beside the real photos' own.
"""

from __future__ import annotations

import numpy as np

from gigdiff.errors import InputError
from gigdiff.metrics.features import check_features

__all__ = ["pairwise_diversity", "vendi_score"]


def pairwise_diversity(features: np.ndarray) -> np.ndarray:
    """Features (P, K, D) of K at least 2 images of each of P prompts -> float64 (P,). 0 = all of a prompt are alike."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise InputError(
            f"features have shape {features.shape}; (prompts, images a prompt, D) with at least 2 images a prompt is "
            "needed: give more seeds"
        )
    check_features(features.reshape(-1, features.shape[2]), metric="pairwise diversity")
    unit = _unit(features.astype(np.float64))
    count = features.shape[1]
    # The sum of all pairs' cosines is the squared length of the sum, less the images' own.
    pairs = ((unit.sum(axis=1) ** 2).sum(axis=1) - (unit**2).sum(axis=(1, 2))) / (count * (count - 1))
    return 1.0 - pairs


def vendi_score(features: np.ndarray) -> float:
    """Features (N, D), N at least 1 -> the effective number of different images, in [1, N]."""
    check_features(features, metric="a Vendi score")
    unit = _unit(features.astype(np.float64))
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues, but for zeros
    values = np.linalg.eigvalsh(gram / len(unit))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
