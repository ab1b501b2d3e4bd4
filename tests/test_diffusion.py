"""The mathematics against diffusers' schedulers and against properties that a swapped sign would break."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from gigdiff import diffusion
from gigdiff.errors import InputError


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def draw(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 4, 5, generator=generator), torch.randn(count, 3, 4, 5, generator=generator)


def test_noise_and_velocity_agree_with_diffusers_at_whole_timesteps(scheduler: DDPMScheduler) -> None:
    x, noise = draw()
    t = torch.tensor([0, 10, 300, 700, 999])
    log_sigma = diffusion.log_sigmas(scheduler.alphas_cumprod)[t]
    torch.testing.assert_close(
        diffusion.add_noise(x, noise, log_sigma), scheduler.add_noise(x, noise, t), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        diffusion.velocity(x, noise, log_sigma), scheduler.get_velocity(x, noise, t), rtol=1e-4, atol=1e-5
    )


def test_clean_and_noise_come_back_from_the_velocity() -> None:
    x, noise = draw()
    log_sigma = torch.linspace(-3, 3, 5)
    z, v = diffusion.add_noise(x, noise, log_sigma), diffusion.velocity(x, noise, log_sigma)
    torch.testing.assert_close(diffusion.clean_from_velocity(z, v, log_sigma), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diffusion.noise_from_velocity(z, v, log_sigma), noise, rtol=1e-4, atol=1e-5)


def test_timesteps_invert_log_sigmas_and_interpolate_between(scheduler: DDPMScheduler) -> None:
    table = diffusion.log_sigmas(scheduler.alphas_cumprod)
    assert (table.diff() > 0).all()
    whole = torch.tensor([0.0, 1.0, 500.0, 999.0])
    torch.testing.assert_close(diffusion.timesteps_of(table[whole.long()], table), whole, rtol=0, atol=1e-2)
    half = (table[500] + table[501]) / 2
    assert diffusion.timesteps_of(half[None], table).item() == pytest.approx(500.5, abs=1e-2)
    outside = diffusion.timesteps_of(torch.tensor([-99.0, 99.0]), table)
    assert outside.tolist() == [0.0, 999.0]


def test_one_ddim_step_from_the_true_velocity_lands_on_the_clean_latents() -> None:
    """Our velocity is what diffusers' solvers take: the true one leads from noise to x in one step."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    x, noise = draw(1)
    log_sigma = diffusion.log_sigmas(scheduler.alphas_cumprod)[t][None]
    z, v = diffusion.add_noise(x, noise, log_sigma), diffusion.velocity(x, noise, log_sigma)
    torch.testing.assert_close(scheduler.step(v, t, z).prev_sample, x, rtol=1e-3, atol=1e-4)


def test_guidance_is_diffusers_convention() -> None:
    u, c = draw()
    assert torch.equal(diffusion.guided(u, c, 0.0), u)
    torch.testing.assert_close(diffusion.guided(u, c, 1.0), c)
    torch.testing.assert_close(diffusion.guided(u, c, 3.0), c + 2 * (c - u))


def test_min_snr_weight_by_hand() -> None:
    # sigma = 1: SNR 1, weight 1 / 2; sigma = 0.1: SNR 100 capped at 5, weight 5 / 101
    weights = diffusion.min_snr_weight(
        torch.tensor([0.0, 0.1]).log().nan_to_num(neginf=-9.0) + torch.tensor([9.0, 0.0]), 5
    )
    assert weights.tolist() == pytest.approx([0.5, 5 / 101], rel=1e-4)


def test_which_steps_guide_anew() -> None:
    anew = diffusion.steps_guided_anew
    assert anew(15, 1) == set(range(15))
    assert anew(15, 2) == {0, 1, 2, 3, 4, 6, 8, 10, 12, 14}
    assert anew(15, 4) == {0, 1, 2, 3, 4, 6, 10, 14}
    assert anew(15, 1000) == {0, 1, 2, 3, 4, 6, 10}
    assert anew(4, 8) == {0, 1, 2} and anew(2, 8) == {0, 1}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_change_of_the_output_is_that_change_of_the_noise(kind: str) -> None:
    """Against DDIM's own conversion of an output to predicted noise, taken from where its step lands."""
    x, noise = draw(1)
    outputs = noise, x
    for t in (50, 500, 950):
        solver = DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
        solver.set_timesteps(20)
        a, before = (float(solver.alphas_cumprod[i]) for i in (t, t - 50))
        landed = [solver.step(output, t, x).prev_sample for output in outputs]
        # x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) e with x_0 = (z - sqrt(1 - a) e) / sqrt(a): linear in e.
        slope = (1 - before) ** 0.5 - (before * (1 - a) / a) ** 0.5
        expected = (outputs[1] - outputs[0]) * diffusion.noise_per_output(kind, a)
        torch.testing.assert_close((landed[1] - landed[0]) / slope, expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_kind_of_prediction_is_named() -> None:
    with pytest.raises(InputError, match="'flow' is unknown; known are epsilon, v_prediction, sample"):
        diffusion.noise_per_output("flow", 0.5)
