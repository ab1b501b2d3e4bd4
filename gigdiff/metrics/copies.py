"""Does a model copy its training photos? Each drawn image's nearest train photo, against its second nearest.

    ratio = distance to the nearest train photo / distance to the nearest train photo of another product

Yoon et al. 2023, "Diffusion Probabilistic Models Generalize When They Fail to Memorize": an image much nearer to one
photo than to any other is a copy of it. The second nearest is taken from another group (product), because catalogues
show one product several times, and a copy of such a photo would have two nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gigdiff.errors import InputError
from gigdiff.metrics.features import check_features

__all__ = ["COPY_RATIO", "CopyTest", "copy_test"]

COPY_RATIO = 0.5  # below it an image counts as copied; how often real held-out photos do is a control in every report
ROWS = 128


@dataclass(frozen=True)
class CopyTest:
    """Of each image: the nearest train photo's index, its distance, that of the nearest of another group, (N,) each."""

    nearest: np.ndarray
    distance: np.ndarray
    second: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """In [0, 1], 0 = an exact copy."""
        return self.distance / np.maximum(self.second, 1e-12)


def copy_test(features: np.ndarray, train: np.ndarray, groups: Sequence[str] | None = None) -> CopyTest:
    """Features (N, D) against those of the train photos (M, D), by Euclidean distance.

    Args:
        groups: which product each train photo shows, M; without it every photo is its own group.
    """
    check_features(features, train, least=1, metric="the copy test")
    codes = (
        np.arange(len(train)) if groups is None else np.unique(np.asarray(groups, dtype=object), return_inverse=True)[1]
    )
    if len(codes) != len(train):
        raise InputError(f"{len(codes)} groups for {len(train)} train photos; one a photo is needed")
    if len(np.unique(codes)) < 2:
        raise InputError("the copy test needs train photos of at least 2 products, 1 given; give more train photos")
    lengths = (train**2).sum(axis=1)
    nearest, distance, second = [], [], []
    for start in range(0, len(features), ROWS):
        x = features[start : start + ROWS]
        order = lengths[None, :] - 2.0 * (x @ train.T)  # less |x|^2, which orders alike
        first = order.argmin(axis=1)
        order[codes[None, :] == codes[first][:, None]] = np.inf
        other = order.argmin(axis=1)
        nearest.append(first)
        # From differences, not from |x|^2 + |y|^2 - 2 x.y, which loses all digits of a copy's tiny distance.
        distance.append(np.linalg.norm(x.astype(np.float64) - train[first], axis=1))
        second.append(np.linalg.norm(x.astype(np.float64) - train[other], axis=1))
    return CopyTest(np.concatenate(nearest), np.concatenate(distance), np.concatenate(second))
