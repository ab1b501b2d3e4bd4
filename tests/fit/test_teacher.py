"""The diffusion teacher against Gaussians, of which the best denoiser is known."""

from __future__ import annotations

import torch

from gigdiff.diffusion import alpha_beta, log_sigmas
from gigdiff.fit.teacher import Teacher

TABLE = log_sigmas(torch.linspace(0.9999, 0.002, 1000))


class GaussianDenoiser:
    """The best v-prediction where latents are N(mean of the text, s^2): text 0 has mean 0, text 1 mean 1."""

    def __init__(self, s: float) -> None:
        self.s, self.rows = s, 0

    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, *, encoder_hidden_states: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        self.rows += len(z)
        low = t.floor().long().clamp(max=len(TABLE) - 2)
        log_sigma = torch.lerp(TABLE[low], TABLE[low + 1], t - low)
        alpha, beta = alpha_beta(log_sigma, z)
        mean = encoder_hidden_states[:, 0, 0].view(-1, 1, 1, 1)
        clean = mean + alpha * self.s**2 / (alpha**2 * self.s**2 + beta**2) * (z - alpha * mean)
        return ((alpha * z - clean) / beta,)


def conditions(means: list[float]) -> torch.Tensor:
    return torch.tensor(means).view(-1, 1, 1).expand(-1, 2, 3)


def test_the_guided_estimate_goes_past_the_texts_own() -> None:
    """E[x | z, text] + (w - 1) (E[x | z, text] - E[x | z]), at any level; no second pass where w is 1."""
    torch.manual_seed(0)
    z, log_sigma, s = torch.randn(3, 2, 4, 4), torch.tensor([-1.0, 0.3, 2.0]), 0.5
    alpha, beta = alpha_beta(log_sigma, z)
    share = alpha * s**2 / (alpha**2 * s**2 + beta**2)
    for scale, rows in ((1.0, 3), (2.5, 6)):
        denoiser = GaussianDenoiser(s)
        made = Teacher(denoiser, conditions([0.0]), scale, TABLE).clean(conditions([1.0] * 3))(z, log_sigma)
        for_text, for_none = 1 + share * (z - alpha), share * z
        torch.testing.assert_close(made, for_text + (scale - 1) * (for_text - for_none), rtol=1e-3, atol=1e-4)
        assert denoiser.rows == rows


def test_what_is_drawn_is_pulled_to_its_own_text() -> None:
    """Steepest descent on the correction takes drawings of the wrong kind to their text's mean, each to its own."""
    torch.manual_seed(0)
    teacher = Teacher(GaussianDenoiser(0.05), conditions([0.0]), 1.0, TABLE)
    texts, weights = conditions([1.0, -1.0]), torch.ones(1, 2, 1, 1)
    drawn = torch.zeros(2, 2, 4, 4, requires_grad=True)
    for _ in range(300):
        noise, level = torch.randn(2, 2, 4, 4), torch.randn(2)
        (grad,) = torch.autograd.grad(teacher.correction(drawn, noise, level, texts, weights).sum(), drawn)
        drawn = (drawn - 0.2 * grad).detach().requires_grad_()
    means = drawn.detach().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor([1.0, -1.0]), atol=0.1, rtol=0)


def test_the_correction_is_a_distance_in_what_shows() -> None:
    """From a constant estimate it is the root mean square of the difference, weighed by channel; the pull is along it,
    as nothing flows back through the teacher."""
    torch.manual_seed(0)
    teacher = Teacher(GaussianDenoiser(1e-4), conditions([0.0]), 1.0, TABLE)  # says the text's mean whatever it sees
    drawn = torch.randn(2, 2, 4, 4, requires_grad=True)
    weights = torch.tensor([2.0, 0.5]).view(1, 2, 1, 1)
    found = teacher.correction(
        drawn, torch.randn(2, 2, 4, 4), torch.tensor([0.0, 1.0]), conditions([1.0, 1.0]), weights
    )
    expected = (weights * (drawn - 1)).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    found.sum().backward()
    direction = weights**2 * (drawn.detach() - 1)
    cosine = torch.nn.functional.cosine_similarity(drawn.grad.flatten(1), direction.flatten(1))  # type: ignore[union-attr]
    assert (cosine > 0.999).all()
