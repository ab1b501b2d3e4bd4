"""Consistency distillation's functions against closed forms and against the scheduler that samples the student."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from gigdiff.consistency import (
    clean_between,
    clean_from,
    consistency_distance,
    huber,
    knot_timesteps,
    path_levels,
    path_points,
    solver_step,
)
from gigdiff.diffusion import add_noise, log_sigmas, velocity
from gigdiff.errors import InputError

Clean = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("knots", [4, 8, 20])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_scheduler_steps_on_the_knots_and_nowhere_else(knots: int, steps: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=knots, prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    known = knot_timesteps(knots).tolist()
    assert set(scheduler.timesteps.tolist()) <= set(known)
    assert scheduler.timesteps[0] == known[-1] == 999
    assert known[0] == 0 and len(known) == knots + 1


def test_knots_must_divide_the_schedule() -> None:
    with pytest.raises(InputError, match="7 knots do not divide 1000"):
        knot_timesteps(7)


def path_of_a_gaussian(z: torch.Tensor, spread: float, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Where the probability-flow path of data N(0, spread^2) goes: z keeps its rank, so it scales with the marginal."""

    def deviation(log_sigma: torch.Tensor) -> torch.Tensor:
        variance = log_sigma.exp().square()
        return ((spread**2 + variance) / (1 + variance)).sqrt().view(-1, 1, 1, 1)

    return z * deviation(end) / deviation(start)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_the_solver_follows_the_exact_path_to_second_order(spread: float) -> None:
    torch.manual_seed(0)
    z = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    start = torch.linspace(0.0, 2.5, 5, dtype=torch.float64)

    def clean(z: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """E[x | z] of that Gaussian: alpha s^2 / (alpha^2 s^2 + beta^2) z."""
        variance = log_sigma.exp().square().view(-1, 1, 1, 1)
        return (1 + variance).sqrt() * spread**2 / (spread**2 + variance) * z

    def error(parts: int) -> float:
        at, here = z, start
        for _ in range(parts):
            there = here - 1.0 / parts
            at, here = solver_step(clean, at, here, there), there
        return (at - path_of_a_gaussian(z, spread, start, start - 1.0)).abs().max().item()

    assert error(8) < 2e-3
    if spread != 1.0:  # there the path is straight and the solver exact from the start
        assert 3.3 < error(8) / error(16) < 4.7


def test_the_solver_lands_on_the_clean_sample_where_the_teacher_knows_it() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    start = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    end = start - torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
    moved = solver_step(lambda z, level: x, add_noise(x, noise, start), start, end)
    assert torch.allclose(moved, add_noise(x, noise, end), atol=1e-12)


def test_huber_by_hand_and_its_pull_is_alike_for_far_and_near() -> None:
    made = torch.zeros(2, 1, 1, 4)
    target = torch.stack([torch.full((1, 1, 4), 3.0), torch.full((1, 1, 4), 0.5)])
    c = 0.00054 * 2
    expected = torch.tensor([(36 + c * c) ** 0.5 - c, (1 + c * c) ** 0.5 - c])
    assert torch.allclose(huber(made, target), expected)
    made.requires_grad_(True)
    huber(made, target).sum().backward()
    assert torch.allclose(made.grad.flatten(1).norm(dim=1), torch.ones(2), atol=1e-5)
    assert huber(target, target).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_kind_of_output_stands_for_the_same_clean_latents(prediction_type: str) -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)
    level = torch.tensor([-2.0, 0.0, 1.0, 2.5], dtype=torch.float64)
    output = {"epsilon": noise, "v_prediction": velocity(x, noise, level), "sample": x}[prediction_type]
    z = add_noise(x, noise, level)
    assert torch.allclose(clean_from(output, z, level, prediction_type), x, atol=1e-10)
    with pytest.raises(InputError, match="flow"):
        clean_from(output, z, level, "flow")


def test_a_student_that_knows_the_end_is_at_no_distance_and_one_that_does_not_is() -> None:
    """The teacher knows x, so every point of its path ends there; knot 1's target is the point next to clean."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)
    levels = torch.tensor([-8.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    knot = torch.tensor([1, 2, 3, 1])
    asked = []

    def student(z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        asked.append(at.tolist())
        return x

    distance = consistency_distance(student, student, lambda z, level: x, x, noise, knot, levels)
    assert distance.max() < 0.02 and asked == [[0, 1, 2, 0], [1, 2, 3, 1]]
    wrong = consistency_distance(lambda z, at: x + 1, student, lambda z, level: x, x, noise, knot, levels)
    assert torch.allclose(wrong, torch.full((4,), 18**0.5, dtype=torch.float64), atol=0.05)


def drawn_by(scheduler: DPMSolverMultistepScheduler | DDIMScheduler, clean: Clean, z: torch.Tensor, steps: int) -> list:
    """The points that a diffusers scheduler goes through from z, of a teacher that gives clean estimates."""
    scheduler.set_timesteps(steps)
    points = [z]
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t].double()
        level = (0.5 * ((1 - a) / a).log()).expand(len(z))
        points.append(scheduler.step(clean(points[-1], level), t, points[-1]).prev_sample)
    return points


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "sample"}


def wavy(z: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """A teacher's clean estimate that is no linear function of anything."""
    return torch.sin(3 * z + log_sigma.view(-1, 1, 1, 1)) * 0.8


@pytest.mark.parametrize("steps", [1, 2, 8, 12])
def test_a_path_is_the_one_that_diffusers_solver_draws_through(steps: int) -> None:
    torch.manual_seed(0)
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing", **SCHEDULE)
    levels = path_levels(log_sigmas(scheduler.alphas_cumprod).double(), steps)
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    ours = path_points(wavy, noise, levels)
    for mine, theirs in zip(ours, drawn_by(scheduler, wavy, noise, steps), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)  # diffusers' sigmas are in float32


def test_a_student_that_learnt_what_leads_along_a_path_draws_its_end_in_ddim_steps() -> None:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **SCHEDULE)
    table = log_sigmas(scheduler.alphas_cumprod).double()
    points = path_points(wavy, torch.randn(3, 2, 4, 4, dtype=torch.float64), path_levels(table, 12))[::3]
    levels = [*table[knot_timesteps(4)][1:].flip(0), torch.tensor(-torch.inf, dtype=torch.float64)]
    leading = [clean_between(*points[i : i + 2], levels[i].expand(3), levels[i + 1].expand(3)) for i in range(4)]
    known = iter(leading)
    drawn = drawn_by(scheduler, lambda z, level: next(known), points[0], 4)
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(points, drawn, strict=True))
    assert torch.equal(leading[-1], points[-1])  # nearest to clean it is the end itself
