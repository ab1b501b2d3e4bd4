"""Diffusion mathematics as small pure functions: noise levels, prediction targets, losses, guidance.

Notation of Karras et al. 2022 (arXiv 2206.00364) over diffusers' variance-preserving schedules: a clean latent x, unit
Gaussian noise e and a noise level sigma give the noisy latent

    z = alpha x + beta e,     alpha = 1 / sqrt(1 + sigma^2),     beta = sigma / sqrt(1 + sigma^2),

and alphas_cumprod[t] of a diffusers scheduler is alpha^2 at integer timestep t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gigdiff.errors import InputError

__all__ = [
    "add_noise",
    "alpha_beta",
    "clean_from_velocity",
    "guided",
    "log_sigmas",
    "min_snr_weight",
    "noise_from_velocity",
    "noise_per_output",
    "steps_guided_anew",
    "timesteps_of",
    "velocity",
]


def log_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """log sigma_t (T,) of a scheduler's alphas_cumprod (T,): sigma^2 = (1 - a) / a. Increasing in t."""
    a = alphas_cumprod.double()
    return (0.5 * ((1 - a) / a).log()).float()


def timesteps_of(log_sigma: Tensor, table: Tensor) -> Tensor:
    """Fractional timesteps (N,) in [0, T - 1] at which the schedule has `log_sigma` (N,), by linear interpolation.

    `table` is `log_sigmas(...)`. The UNet's sinusoidal time embedding takes fractions, so training can draw noise
    levels from a continuous law and inference use the scheduler's integers.
    """
    above = torch.searchsorted(table, log_sigma.clamp(table[0], table[-1])).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    fraction = ((log_sigma - low) / (high - low)).clamp(0, 1)
    return (above - 1) + fraction


def alpha_beta(log_sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta of `log_sigma` (N,), shaped to broadcast over `like` (N, ...)."""
    sigma = log_sigma.exp().view(-1, *[1] * (like.ndim - 1))
    alpha = (1 + sigma.square()).rsqrt()
    return alpha, sigma * alpha


def add_noise(x: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
    """z = alpha x + beta e. x and noise (N, ...), log_sigma (N,)."""
    alpha, beta = alpha_beta(log_sigma, x)
    return alpha * x + beta * noise


def velocity(x: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
    """v = alpha e - beta x, the target of v-prediction (Salimans and Ho 2022, arXiv 2202.00512, section 4).

    For unit-variance x its squared error equals EDM's preconditioned and weighted loss.
    """
    alpha, beta = alpha_beta(log_sigma, x)
    return alpha * noise - beta * x


def clean_from_velocity(z: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
    """x = alpha z - beta v."""
    alpha, beta = alpha_beta(log_sigma, z)
    return alpha * z - beta * v


def noise_from_velocity(z: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
    """e = beta z + alpha v."""
    alpha, beta = alpha_beta(log_sigma, z)
    return beta * z + alpha * v


def min_snr_weight(log_sigma: Tensor, gamma: float, prediction_type: str = "v_prediction") -> Tensor:
    """Weight (N,) on the squared error: min(SNR, gamma), SNR = sigma^-2, of the clean latent's error (Hang et al.,
    2303.09556), in terms of what is predicted: over SNR + 1 for "v_prediction", over SNR for "epsilon"."""
    snr = (-2 * log_sigma).exp()
    over = {"v_prediction": snr + 1, "epsilon": snr, "sample": torch.ones_like(snr)}[prediction_type]
    return snr.clamp(max=gamma) / over


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """uncond + w (cond - uncond) (Ho and Salimans 2022, arXiv 2207.12598, in diffusers' convention: w = 1 is off)."""
    return unconditional + scale * (conditional - unconditional)


def steps_guided_anew(steps: int, reuse: int) -> set[int]:
    """The steps (from 0) that compute both halves of guidance when up to `reuse` steps share one cond - uncond.

    The first third (three at least) all do: there the picture is decided and the difference changes most. From then on
    one is taken 2, 4, 8, ... times, at most `reuse` times, kept as a difference of predicted noise (the idea of
    FasterCache, Lv et al. 2024, arXiv 2410.19355).
    """
    first = max(3, -(-steps // 3))
    anew, step, gap = set(range(min(first, steps))), first - 1, 2
    while (step := step + min(gap, reuse)) < steps:
        anew.add(step)
        gap *= 2
    return anew


def noise_per_output(prediction_type: str, a: float) -> float:
    """How much predicted noise changes with the network's output, at alphas_cumprod = a and a given noisy sample.

    Raises:
        InputError: an unknown prediction_type.
    """
    factors = {"epsilon": 1.0, "v_prediction": a**0.5, "sample": -((a / (1 - a)) ** 0.5)}
    if prediction_type not in factors:
        raise InputError(f"prediction_type {prediction_type!r} is unknown; known are {', '.join(factors)}")
    return factors[prediction_type]
