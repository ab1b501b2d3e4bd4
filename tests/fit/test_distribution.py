"""gigdiff.fit.distribution: the gradient of distribution matching, and where it leads."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from gigdiff.diffusion import add_noise, alpha_beta, log_sigmas
from gigdiff.fit.distribution import LEVELS, DistributionMatching, NoiseDraws, matching_loss
from gigdiff.fit.teacher import Teacher


def test_the_gradient_is_the_difference_of_the_estimates_over_how_far_the_teacher_is_off() -> None:
    torch.manual_seed(0)
    made, real, fake = torch.randn(3, 4, 2, 5, 2, dtype=torch.double).unbind(0)
    made.requires_grad_()
    matching_loss(made, real, fake).sum().backward()
    expected = torch.stack([(f - r) / (m - r).abs().mean() for m, r, f in zip(made, real, fake, strict=True)]) / 20
    torch.testing.assert_close(made.grad, expected.detach())
    assert torch.equal(matching_loss(made, real, real), torch.zeros(4, dtype=torch.double))


def estimate(z: Tensor, level: Tensor, mean: float, deviation: float) -> Tensor:
    """E[x | z] where x is normal."""
    alpha, beta = alpha_beta(level, z)
    share = alpha * deviation**2 / (alpha**2 * deviation**2 + beta**2)
    return mean + share * (z - alpha * mean)


def test_with_exact_estimates_a_student_of_two_numbers_comes_to_the_teachers_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.tensor([-1.0, 0.3], requires_grad=True)  # mean, log deviation
    optimizer = torch.optim.Adam([student], lr=0.03)
    for _ in range(600):
        # Of many numbers a sample: the weight is one of all, and tells of a single one which way it is off.
        noise, more = torch.randn(2, 64, 100, generator=generator)
        level = torch.randn(64, generator=generator)
        made = student[0] + student[1].exp() * noise
        z = add_noise(made.detach(), more, level)
        fake = estimate(z, level, student[0].item(), student[1].exp().item())
        real = estimate(z, level, 2.0, 0.5)
        optimizer.zero_grad()
        matching_loss(made, real, fake).mean().backward()
        optimizer.step()
    mean, deviation = student[0].item(), student[1].exp().item()
    assert abs(mean - 2.0) < 0.05 and abs(deviation - 0.5) < 0.05


def test_a_steps_chances_are_its_own() -> None:
    def draws(step: int, process: int = 0) -> NoiseDraws:
        return NoiseDraws.of(step, process, 2, torch.Size((64, 4, 3, 2)), 1000, seed=7)

    first = draws(5)
    assert first.noise.shape == (3, 64, 4, 3, 2) and first.timesteps.shape == (3, 64)
    low, high = (1000 * level for level in LEVELS)
    assert first.timesteps.min() >= low and first.timesteps.max() < high and first.timesteps.float().std() > 250
    assert torch.equal(draws(5).noise, first.noise) and torch.equal(draws(5).timesteps, first.timesteps)
    assert not torch.equal(draws(6).noise, first.noise) and not torch.equal(draws(5, 1).noise, first.noise)


def test_the_network_learns_the_drawings_and_the_teacher_stays() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    ).requires_grad_(False)  # fmt: skip
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    teacher = Teacher(unet, torch.randn(1, 5, 12), 1.0, log_sigmas(DDPMScheduler().alphas_cumprod))
    matching = DistributionMatching(
        teacher, updates=3, beta2=0.99, max_grad_norm=1.0, attention="sdpa", mixed_precision="no",
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    matching.prepare()
    made, condition = (0.3 * torch.randn(8, 3, 8, 8) + 1).requires_grad_(), torch.randn(8, 5, 12)
    draws = NoiseDraws.of(0, 0, 3, made.shape, 1000, seed=0)
    assert matching.loss(made, condition, draws).max() < 1e-6  # as yet it is the teacher, who is not guided
    losses = [matching.learn(made, condition, draws, 3e-3)["fake_loss"] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    matching.loss(made, condition, draws).sum().backward()
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())
