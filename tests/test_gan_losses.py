"""GAN losses and regularisers against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gigdiff import gan_losses as losses

SOFTPLUS_1, SOFTPLUS_3 = math.log(1 + math.e), math.log(1 + math.e**3)


@pytest.mark.parametrize(
    ("loss", "discriminator", "generator"),
    [
        # real 2, fake -1
        ("non_saturating", math.log(1 + math.e**-2) + math.log(1 + math.e**-1), SOFTPLUS_1),
        ("wgan_gp", -3.0, 1.0),
        ("hinge", 0.0, 1.0),
        ("relativistic", math.log(1 + math.e**-3), SOFTPLUS_3),
    ],
)
def test_losses_by_hand(loss: str, discriminator: float, generator: float) -> None:
    real, fake = torch.tensor([2.0]), torch.tensor([-1.0])
    assert losses.DISCRIMINATOR_LOSSES[loss](real, fake).item() == pytest.approx(discriminator, rel=1e-5)
    assert losses.GENERATOR_LOSSES[loss](real, fake).item() == pytest.approx(generator, rel=1e-5)


def test_hinge_charges_scores_inside_the_margin() -> None:
    value = losses.DISCRIMINATOR_LOSSES["hinge"](torch.tensor([0.25]), torch.tensor([-0.5]))
    assert value.item() == pytest.approx(0.75 + 0.5)


@pytest.mark.parametrize("loss", sorted(losses.DISCRIMINATOR_LOSSES))
def test_the_two_losses_pull_opposite_ways(loss: str) -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    losses.DISCRIMINATOR_LOSSES[loss](real, fake).sum().backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # type: ignore[operator]
    fake.grad = None
    losses.GENERATOR_LOSSES[loss](real, fake).sum().backward()
    assert (fake.grad < 0).all()  # type: ignore[operator]


class Quadratic(nn.Module):
    """D(x) = a/2 |x|^2, so grad D = a x."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a / 2 * x.flatten(1).square().sum(1)[None]


def test_r1_by_hand() -> None:
    """1/2 E |a x|^2 for |x|^2 = 25 and 4, a = 3: 1/2 * 9 * 14.5 = 65.25, and its derivative by a is a * 14.5."""
    net = Quadratic(3.0)
    images = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]], requires_grad=True)
    penalty = losses.gradient_penalty(net(images), images)
    assert penalty.item() == pytest.approx(65.25)
    penalty.backward()
    assert net.a.grad.item() == pytest.approx(3 * 14.5)  # type: ignore[union-attr]


def test_r1_plus_r2_sums_the_means_of_real_and_fake_images() -> None:
    net = Quadratic(2.0)
    images = torch.tensor([3.0, 1.0, 0.0, 2.0]).view(4, 1, 1, 1).requires_grad_()  # real 3, 1; fake 0, 2
    penalty = losses.gradient_penalty(net(images).view(2, 2), images)
    assert penalty.item() == pytest.approx(0.5 * 4 * (9 + 1) / 2 + 0.5 * 4 * (0 + 4) / 2)


def test_finite_differences_tend_to_the_exact_penalty() -> None:
    net = Quadratic(1.0)
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(20000, 1, 1, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    one = images[:1].clone().requires_grad_()
    exact = losses.gradient_penalty(net(one), one)
    approximate = losses.finite_difference_penalty(net(images), net(images + 0.01 * noise), 0.01)
    assert approximate.item() == pytest.approx(exact.item(), rel=0.05)


def test_wgan_gp_by_hand() -> None:
    """D(x) = a x_1 + b x_2: the gradient is (a, b) everywhere, so the penalty is (sqrt(a^2 + b^2) - 1)^2."""
    a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0)
    images = losses.interpolate(torch.ones(5, 1, 1, 2), torch.zeros(5, 1, 1, 2), torch.linspace(0, 1, 5))
    assert torch.equal(images.flatten(1)[:, 0], torch.linspace(0, 1, 5)) and images.requires_grad
    scores = images.flatten(1) @ torch.stack([a, b])
    penalty = losses.unit_gradient_penalty(scores, images)
    assert penalty.item() == pytest.approx(16.0)
    penalty.backward()
    assert a.grad.item() == pytest.approx(2 * (5 - 1) * 3 / 5)  # type: ignore[union-attr]


def test_wgan_gp_has_a_finite_derivative_where_the_gradient_is_zero() -> None:
    a = torch.tensor(0.0, requires_grad=True)
    images = torch.ones(2, 1, 1, 1, requires_grad=True)
    penalty = losses.unit_gradient_penalty(a * images.flatten(1).sum(1), images)
    penalty.backward()
    assert penalty.item() == pytest.approx(1.0, abs=1e-4) and math.isfinite(a.grad.item())  # type: ignore[union-attr]


def test_contrastive_loss_by_hand_and_with_texts_that_occur_twice() -> None:
    similarity = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    expected = math.log(1 + math.e**-2)
    assert losses.contrastive_loss(similarity, torch.eye(2).bool()).item() == pytest.approx(expected, rel=1e-5)
    same = torch.ones(2, 2).bool()  # both images have the same text: nothing to tell apart
    assert losses.contrastive_loss(torch.zeros(2, 2), same).item() == pytest.approx(math.log(2))
    # Preferring its own copy of a text over the other is punished, not rewarded.
    assert losses.contrastive_loss(similarity, same) > losses.contrastive_loss(torch.zeros(2, 2), same)


def test_overfitting_sign() -> None:
    real, fake = torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([4.0, 0.0, -2.0, -5.0])
    assert losses.overfitting_sign("non_saturating", real, fake) == 0.5
    assert losses.overfitting_sign("relativistic", real, fake) == 0.5
    assert losses.overfitting_sign("wgan_gp", real + 10, fake + 10) == 0.5
    assert losses.overfitting_sign("hinge", real + 10, fake + 10) == 1.0


def test_a_wrong_text_counts_as_a_fake_unless_it_is_the_images_own() -> None:
    """Three images, the last two with equal texts: image 2 with text 1 is no mismatch."""
    real, fake, mismatched = torch.tensor([2.0, 2.0, 2.0]), torch.zeros(3), torch.tensor([5.0, 5.0, 5.0])
    same = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()
    value = losses.critic_loss("wgan_gp", real, fake, mismatched, same, 0.25)
    assert value.item() == pytest.approx(0.75 * -2 + 0.25 * (3 + 3 + 0) / 3)


def test_two_drawings_of_a_text_that_are_too_alike_cost_something() -> None:
    """Photos lie 2 apart; drawings 0.2 and 2 apart are shares of 0.1 and 1."""
    reals = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    first, second = torch.zeros(2, 1, 1, 1), torch.tensor([0.2, 2.0]).view(2, 1, 1, 1)
    assert losses.diversity_loss(first, second, reals, 0.3).item() == pytest.approx(0.2 / 2)
    assert losses.diversity_loss(first, second, reals, 0.1).item() == pytest.approx(0.0, abs=1e-6)
