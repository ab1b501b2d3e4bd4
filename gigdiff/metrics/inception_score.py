"""Inception Score: are the images' classes clear each, and many in all?

    IS = exp( mean_i KL( p(y | x_i) || p(y) ) ),   p(y) = mean_i p(y | x_i)

Salimans et al., arXiv 1606.03498, eq. 1. Between 1 and the number of classes; it compares with nothing real, so read it
beside the real photos' own. The classifier is part of the metric: InceptionV3 in the paper, here whatever is given.
"""

from __future__ import annotations

import numpy as np

from gigdiff.errors import InputError, NumericalError

__all__ = ["inception_score"]


def inception_score(log_probabilities: np.ndarray, splits: int = 1) -> tuple[float, float]:
    """Log-probabilities (N, classes) of each image -> mean and standard deviation of the score over `splits` parts.

    The parts are taken in the order given; the paper used 10 of 5,000. With one part the deviation is 0.
    """
    if log_probabilities.ndim != 2:
        raise InputError(f"log-probabilities have shape {log_probabilities.shape}; (N, classes) is needed")
    if not 1 <= splits <= len(log_probabilities):
        raise InputError(f"an Inception Score over {splits} parts needs as many images, {len(log_probabilities)} given")
    if np.isnan(log_probabilities).any():
        raise NumericalError("log-probabilities hold NaN; check the images and the classifier")
    values = []
    for part in np.array_split(log_probabilities.astype(np.float64), splits):
        p = np.exp(part)
        marginal = np.log(np.maximum(p.mean(axis=0), 1e-300))
        divergence = (p * np.where(p > 0, part - marginal, 0.0)).sum(axis=1)
        values.append(np.exp(divergence.mean()))
    return float(np.mean(values)), float(np.std(values))
