"""The mathematics against diffusers' schedulers and against properties that a swapped sign would break."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from gigdiff import diffusion


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
