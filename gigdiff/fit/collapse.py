"""Watching a generator for collapse while it trains: is there variety, for each prompt and over all of them?

No network that measures is used, only the variance of what is drawn (latents or pixels) against that of held-out
photos, and a Fréchet distance between both on a coarse grid, by which the best checkpoint is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gigdiff.metrics.frechet import feature_statistics, frechet_distance

__all__ = ["CollapseWatch", "Variety", "coarse_frechet", "measure_variety", "overfitting_ratio"]

MOST_FEATURES = 512


@dataclass(frozen=True)
class Variety:
    """What was measured of a generator's drawings.

    Attributes:
        diversity: variance over prompts, as a share of the held-out photos'; 1 = as varied as they are.
        prompt_diversity: variance over the seeds of one prompt, mean over prompts, as a share of the photos' variance.
        distance: `coarse_frechet`, lower is better.
    """

    diversity: float
    prompt_diversity: float
    distance: float


def measure_variety(fakes: Tensor, repeated: Tensor, reals: Tensor) -> Variety:
    """fakes (N, C, H, W), one a held-out prompt; repeated (P, S, C, H, W), S seeds of P prompts; reals (N, C, H, W)."""
    of_reals = _variance(reals)
    within = sum(_variance(one) for one in repeated) / len(repeated)
    return Variety(_variance(fakes) / of_reals, within / of_reals, coarse_frechet(fakes, reals))


def _variance(images: Tensor) -> float:
    return images.double().var(0).mean().item()


def coarse_frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the two sets' values averaged on a coarse grid, as a share of b's variance.

    0 is the same Gaussian; 1 is as far as one photo, always the average one. With few samples it is above 0 for equal
    distributions, so compare it at one count.
    """
    sets = []
    for images in (a, b):
        images = images.double()
        rows, columns = images.shape[2:]
        while images.shape[1] * rows * columns > MOST_FEATURES:
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        sets.append(torch.nn.functional.adaptive_avg_pool2d(images, (rows, columns)).flatten(1).cpu().numpy())
    statistics = [feature_statistics(features) for features in sets]
    return frechet_distance(statistics[0], statistics[1]) / float(statistics[1].cov.trace())


def overfitting_ratio(on_train: Tensor, on_held_out: Tensor, on_fakes: Tensor) -> float:
    """r_v of ADA (arXiv 2006.06676, equation 1): (E D(train) - E D(held-out)) / (E D(train) - E D(fake)).

    0: photos it has not trained on look as real to it as those it has; 1: they look like fakes.
    """
    train, held_out, fakes = (scores.double().mean().item() for scores in (on_train, on_held_out, on_fakes))
    return (train - held_out) / (train - fakes) if abs(train - fakes) > 1e-6 else 0.0


class CollapseWatch:
    """Remembers the best measurement, and says when variety has been too low too often in a row.

    Args:
        least_diversity, least_prompt_diversity: below either, a measurement counts as bad.
        patience: so many bad measurements in a row are a collapse.
        grace_steps: measurements up to this step are not judged: every generator starts without variety.
    """

    def __init__(
        self, least_diversity: float, least_prompt_diversity: float, patience: int = 2, grace_steps: int = 0
    ) -> None:
        self.least_diversity, self.least_prompt_diversity = least_diversity, least_prompt_diversity
        self.patience, self.grace_steps = patience, grace_steps
        self.best_distance, self.best_step, self.bad = math.inf, 0, 0

    @property
    def collapsed(self) -> bool:
        return self.bad >= self.patience

    def see(self, step: int, variety: Variety) -> bool:
        """Take a measurement in; True if it is the best so far among those with variety enough."""
        poor = (
            variety.diversity < self.least_diversity
            or variety.prompt_diversity < self.least_prompt_diversity
            or not math.isfinite(variety.distance)
        )
        if step > self.grace_steps:
            self.bad = self.bad + 1 if poor else 0
        if poor or variety.distance >= self.best_distance:
            return False
        self.best_distance, self.best_step = variety.distance, step
        return True

    def message(self, step: int, variety: Variety) -> str:
        """What a collapsed run says."""
        kept = f"its best state is of step {self.best_step}, in best/" if self.best_step else "it was never varied"
        return (
            f"collapsed at step {step}: the variety of what it draws is {variety.diversity:.3f} of the photos' over "
            f"prompts (at least {self.least_diversity:g} is asked for) and {variety.prompt_diversity:.4f} within one "
            f"(at least {self.least_prompt_diversity:g}), {self.bad} measurements in a row; {kept}. A higher "
            "--penalty_weight, a lower --learning_rate, --augment adaptive or a lower --contrastive_weight may help."
        )

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        return {"state": torch.tensor([self.best_distance, self.best_step, self.bad], dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.best_distance, step, bad = tensors["state"].tolist()
        self.best_step, self.bad = int(step), int(bad)
