"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["learning_rate", "set_learning_rate"]


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, decay_fraction: float = 0.4) -> float:
    """Linear warm-up, constant, then a cosine to 1% of the peak over the last `decay_fraction` of the run.

    ("Warmup-stable-decay", Hu et al. 2024, arXiv 2404.06395.) The constant part makes a run extendable: a checkpoint
    taken before the decay can go on under a larger `total_steps` as if it had been meant so from the start.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    decay_start = total_steps * (1 - decay_fraction)
    if step < decay_start:
        return peak
    progress = min(1.0, (step - decay_start) / max(1.0, total_steps - decay_start))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set every parameter group of `optimizer` to `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
