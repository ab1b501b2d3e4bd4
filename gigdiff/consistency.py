"""Distillation along a teacher's path as pure functions: the knots, the teacher's way from one to the next, distances.

A consistency model f maps a point of any noise level on the teacher's probability-flow path straight to the path's
clean end (Song et al. 2023, arXiv 2303.01469). It is trained only at the knots that it is sampled at: those of
diffusers' LCMScheduler with `original_inference_steps` = count (Luo et al. 2023, arXiv 2310.04378), so that sampling in
1, 2, 4 ... steps (divisors of the count) visits nothing it has not been trained on.

Notation of gigdiff.diffusion: z = alpha x + beta e, v-prediction, log sigma = log(beta / alpha).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gigdiff.diffusion import add_noise, alpha_beta, clean_from_velocity
from gigdiff.errors import InputError

__all__ = [
    "clean_between",
    "clean_from",
    "consistency_distance",
    "consistency_target",
    "huber",
    "knot_timesteps",
    "path_levels",
    "path_points",
    "solver_step",
]


def knot_timesteps(count: int, num_train_timesteps: int = 1000) -> Tensor:
    """int64 (count + 1,): timestep 0, which stands for clean, then `count` knots in equal steps up to the noisiest.

    Raises:
        InputError: a count that does not divide the schedule.
    """
    if count < 1 or num_train_timesteps % count:
        raise InputError(f"{count} knots do not divide {num_train_timesteps} timesteps: take 4, 5, 8, 10, 20 ...")
    stride = num_train_timesteps // count
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, count + 1) * stride - 1])


def solver_step(
    clean: Callable[[Tensor, Tensor], Tensor], z: Tensor, log_sigma: Tensor, next_log_sigma: Tensor
) -> Tensor:
    """One step of DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1, r = 1/2) down the teacher's path.

    With h = lambda' - lambda (lambda = -log sigma), from z to the middle in lambda and then, by the clean estimate made
    in the middle, from z all the way: z' = (beta' / beta) z - alpha' (exp(-h) - 1) x.

    Args:
        clean: (z (N, ...), log_sigma (N,)) -> the teacher's (guided) estimate of x, like z; called twice.
        z: noisy latents (N, ...). log_sigma: where they are (N,). next_log_sigma: where to go (N,), lower.
    """

    def move(x: Tensor, to: Tensor) -> Tensor:
        beta = alpha_beta(log_sigma, z)[1]
        alpha_to, beta_to = alpha_beta(to, z)
        shrink = torch.expm1(to - log_sigma).view(-1, *[1] * (z.ndim - 1))  # exp(-h) - 1
        return beta_to / beta * z - alpha_to * shrink * x

    middle = (log_sigma + next_log_sigma) / 2
    halfway = move(clean(z, log_sigma), middle)
    return move(clean(halfway, middle), next_log_sigma)


def path_levels(table: Tensor, count: int) -> Tensor:
    """log sigma (count,) at diffusers' "trailing" timesteps of `count` steps, falling. table: `log_sigmas`."""
    timesteps = (torch.arange(count, 0, -1, dtype=torch.float64) * (len(table) / count)).round().long() - 1
    return table[timesteps.to(table.device)]


def path_points(clean: Callable[[Tensor, Tensor], Tensor], noise: Tensor, levels: Tensor) -> Tensor:
    """The points that DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) draws through, down to clean.

    With y = z / alpha and h = log(sigma / sigma'): y' = (sigma' / sigma) y + (1 - sigma' / sigma) D, where D is the
    clean estimate x, but between two other steps x + (h / (2 h_before)) (x - x_before).

    Args:
        clean: (z (N, ...), log_sigma (N,)) -> the clean estimate, like z; called once a level.
        noise: z at the first level (N, ...). levels: log sigma of every step (S,), falling.

    Returns:
        (S + 1, N, ...): z at every level, and the clean end.
    """
    points, before = [noise], noise
    for i, level in enumerate(levels):
        z, here = points[-1], level.expand(len(noise))
        x = clean(z, here)
        if i + 1 == len(levels):
            points.append(x)
            break
        h = level - levels[i + 1]
        direction = x if i == 0 else x + h / (2 * (levels[i - 1] - level)) * (x - before)
        to, shrink = levels[i + 1].expand(len(noise)), (-h).exp()
        alpha, alpha_to = alpha_beta(here, z)[0], alpha_beta(to, z)[0]
        points.append(alpha_to * (shrink * z / alpha + (1 - shrink) * direction))
        before = x
    return torch.stack(points)


def clean_between(z: Tensor, nearer: Tensor, log_sigma: Tensor, next_log_sigma: Tensor) -> Tensor:
    """The clean estimate with which one step of DDIM leads from z to `nearer` (Salimans and Ho 2022, arXiv 2202.00512,
    appendix G): x = (y' - r y) / (1 - r) with y = z / alpha and r = sigma' / sigma.

    Args:
        z, nearer: (N, ...). log_sigma: of z (N,). next_log_sigma: of `nearer` (N,), lower; -inf is clean.
    """
    r = (next_log_sigma - log_sigma).exp().view(-1, *[1] * (z.ndim - 1))
    return (nearer / alpha_beta(next_log_sigma, z)[0] - r * z / alpha_beta(log_sigma, z)[0]) / (1 - r)


def clean_from(prediction: Tensor, z: Tensor, log_sigma: Tensor, prediction_type: str) -> Tensor:
    """The clean latents (N, ...) that a network's output stands for: "epsilon", "v_prediction" or "sample".

    Raises:
        InputError: another prediction type.
    """
    if prediction_type == "epsilon":
        alpha, beta = alpha_beta(log_sigma, z)
        return (z - beta * prediction) / alpha
    if prediction_type == "v_prediction":
        return clean_from_velocity(z, prediction, log_sigma)
    if prediction_type == "sample":
        return prediction
    raise InputError(f"prediction_type {prediction_type!r}: distillation knows epsilon, v_prediction and sample.")


def consistency_target(
    target_of: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    knot: Tensor,
    levels: Tensor,
) -> Tensor:
    """Where the teacher's path through `z` ends, by one solver step to the next knot and the student from there.

    Args:
        target_of: (z, knot (N,)) -> the clean end. At knot 0 it is the point itself over alpha.
        teacher: (z, log_sigma (N,)) -> the guided teacher's clean estimate.
        z: noisy latents (N, C, h, w) at their `knot` (N,), from 1. levels: log sigma of every knot, (knots + 1,).

    Returns:
        (N, C, h, w), without gradient.
    """
    lower = knot - 1
    with torch.no_grad():
        nearer = solver_step(teacher, z, levels[knot], levels[lower])
        alpha = alpha_beta(levels[lower], z)[0]
        first = (lower == 0).view(-1, *[1] * (z.ndim - 1))
        return torch.where(first, nearer / alpha, target_of(nearer, lower))


def consistency_distance(
    student: Callable[[Tensor, Tensor], Tensor],
    target_of: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    knot: Tensor,
    levels: Tensor,
) -> Tensor:
    """(N,): how far the student's ends at two neighbouring knots of the teacher's path lie apart (Luo et al., eq. 13).

    student: (z, knot (N,)) -> the clean end. latents, noise: (N, C, h, w). The rest as `consistency_target`'s.
    """
    z = add_noise(latents, noise, levels[knot])
    target = consistency_target(target_of, teacher, z, knot, levels)
    return huber(student(z, knot), target)


def huber(made: Tensor, target: Tensor) -> Tensor:
    """(N,): sqrt(|made - target|^2 + c^2) - c over each sample, c = 0.00054 sqrt(its size).

    The pseudo-Huber distance of Song and Dhariwal 2023 (arXiv 2310.14189, section 3.3): every sample pulls about alike,
    however noisy its level.
    """
    difference = (made - target).flatten(1)
    c = 0.00054 * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c * c).sqrt() - c
