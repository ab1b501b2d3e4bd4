"""Precision, recall, density and coverage: does what is drawn lie among real photos, and does it reach all of them?

Each set is taken as the union of balls around its features, reaching to the k-th nearest neighbour in the set itself.

    precision  share of drawn images inside a ball of the real photos       Kynkäänniemi et al., arXiv 1904.06991, eq. 2
    recall     share of real photos inside a ball of the drawn images
    density    mean number of real balls a drawn image is in, over k        Naeem et al., arXiv 2002.09797, eqs. 4 and 5
    coverage   share of real balls with a drawn image in them

Precision and recall change places with the arguments; mode collapse lowers recall and coverage, never precision. One
outlier with a huge ball raises precision or recall, hardly density or coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gigdiff.metrics.features import check_features

__all__ = ["NEIGHBOURS", "Manifold", "manifold_metrics"]

NEIGHBOURS = 5  # Naeem et al.; Kynkäänniemi et al. used 3 with 50,000 images


@dataclass(frozen=True)
class Manifold:
    """All in [0, 1] but density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(drawn: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS) -> Manifold:
    """Features of drawn images (N, D) and of real photos (M, D), more than `neighbours` each."""
    check_features(drawn, real, least=neighbours + 1, metric=f"precision and recall with {neighbours} neighbours")
    drawn, real = drawn.astype(np.float64), real.astype(np.float64)
    between = _distances(drawn, real)
    real_balls = between < _radii(real, neighbours)[None, :]
    drawn_balls = between < _radii(drawn, neighbours)[:, None]
    return Manifold(
        precision=float(real_balls.any(axis=1).mean()),
        recall=float(drawn_balls.any(axis=0).mean()),
        density=float(real_balls.sum(axis=1).mean() / neighbours),
        coverage=float(real_balls.any(axis=0).mean()),
    )


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row, (N,)."""
    return np.partition(_distances(x, x), neighbours, axis=1)[:, neighbours]  # at 0 is the row itself


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances (N, M)."""
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2.0 * (x @ y.T)
    if x is y:
        np.fill_diagonal(squares, 0.0)
    return np.sqrt(np.clip(squares, 0.0, None))
