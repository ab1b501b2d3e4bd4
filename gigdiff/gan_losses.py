"""GAN losses and regularisers as small pure functions of scores and gradients.

D is the discriminator, r its scores of real images, f of fakes (or of real images with another product's text, which
count as fakes). Generator and discriminator both minimise.

    loss            discriminator                          generator            paper
    non_saturating  softplus(-r) + softplus(f)             softplus(-f)         Goodfellow et al. 2014, 1406.2661
    wgan_gp         f - r                                  -f                   Gulrajani et al. 2017, 1704.00028
    hinge           relu(1 - r) + relu(1 + f)              -f                   Lim and Ye 2017, 1705.02894
    relativistic    softplus(f - r)                        softplus(r - f)      Huang et al. 2024 (R3GAN), 2501.05441

    regulariser     what is added for the discriminator, times its weight
    r1              1/2 E_real |grad D|^2                                       Mescheder et al. 2018, 1801.04406
    r1_r2           1/2 E_real |grad D|^2 + 1/2 E_fake |grad D|^2               R3GAN, equation 5
    wgan_gp         E (|grad D(u x + (1 - u) g)| - 1)^2, u uniform              Gulrajani et al. 2017, equation 3
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DISCRIMINATOR_LOSSES",
    "GENERATOR_LOSSES",
    "RECOMMENDED_PENALTY",
    "contrastive_loss",
    "critic_loss",
    "diversity_loss",
    "finite_difference_penalty",
    "gradient_penalty",
    "interpolate",
    "overfitting_sign",
    "unit_gradient_penalty",
]

Loss = Callable[[Tensor, Tensor], Tensor]

#: (r, f), both (N,) -> loss (N,)
DISCRIMINATOR_LOSSES: dict[str, Loss] = {
    "non_saturating": lambda real, fake: F.softplus(-real) + F.softplus(fake),
    "wgan_gp": lambda real, fake: fake - real,
    "hinge": lambda real, fake: F.relu(1 - real) + F.relu(1 + fake),
    "relativistic": lambda real, fake: F.softplus(fake - real),
}

#: (r, f), both (N,) -> loss (N,); only the relativistic one looks at r
GENERATOR_LOSSES: dict[str, Loss] = {
    "non_saturating": lambda real, fake: F.softplus(-fake),
    "wgan_gp": lambda real, fake: -fake,
    "hinge": lambda real, fake: -fake,
    "relativistic": lambda real, fake: F.softplus(real - fake),
}

#: The regulariser that each loss was published with, or (hinge) is commonly trained with; what "auto" means.
RECOMMENDED_PENALTY = {"non_saturating": "r1", "wgan_gp": "wgan_gp", "hinge": "r1", "relativistic": "r1_r2"}


def _squared_gradients(scores: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each image, differentiable: scores of `images` (N, ...), which require gradients -> (N,)."""
    (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradients.float().square().flatten(1).sum(1)


def gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """1/2 E |grad D|^2, summed over groups, exactly: R1 for real images, R1 + R2 for a group of real and one of fakes.

    Args:
        scores: (k, N), of `images` (k N, ...) group after group, which must require gradients.
    """
    return 0.5 * _squared_gradients(scores, images).view(scores.shape).mean(1).sum()


def finite_difference_penalty(clean: Tensor, noisy: Tensor, noise_std: float) -> Tensor:
    """The same to first order in s, without a second derivative: E (D(x + s n) - D(x))^2 / (2 s^2), n standard normal.

    As s goes to 0 its expectation over n is 1/2 |grad D|^2 (Lin et al. 2025, arXiv 2501.08316, equation 3).

    Args:
        clean, noisy: scores (k, N) of the images without and with noise. noise_std: s.
    """
    return (noisy - clean).square().mean(1).sum() / (2 * noise_std**2)


def interpolate(real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """u x + (1 - u) g for u (N,), requiring gradients: where WGAN-GP's penalty is taken."""
    u = u.view(-1, *[1] * (real.ndim - 1))
    return (u * real + (1 - u) * fake).detach().requires_grad_()


def unit_gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """E (|grad D| - 1)^2: scores (1, N) or (N,) of `images` (N, ...) from `interpolate`.

    There is no finite-difference form of it: a random direction gives the gradient's square but not its length.
    """
    # The small number keeps the root's derivative finite where the gradient is zero.
    return ((_squared_gradients(scores, images) + 1e-12).sqrt() - 1).square().mean()


def contrastive_loss(similarity: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of finding an image's text among the batch's, and a text's image: (N, N) logits -> scalar.

    (Zhang et al. 2021, XMC-GAN, arXiv 2101.04702, section 4.) The discriminator learns it on real images; the generator
    is asked for images whose text can be found.

    Args:
        same: bool (N, N), which texts are the same; the probability is shared among them.
    """
    target = same.float() / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target))


def critic_loss(
    loss: str,
    real: Tensor,
    fake: Tensor,
    mismatched: Tensor,
    same: Tensor,
    mismatch_weight: float,
) -> Tensor:
    """The discriminator's loss where real photos with another product's text are fakes too (Reed et al., 1605.05396).

    (1 - w) loss(real, fake) + w loss(real, mismatched), mean over images. A mismatched pair (image i, text i - 1) is
    held against the real pair of its image and against that of its text: against the former alone, a relativistic
    discriminator could favour some images whatever the text.

    Args:
        real, fake, mismatched: scores (N,); mismatched: of real image i with text i - 1.
        same: bool (N, N), which texts are equal: a neighbour's text that is the image's own is no mismatch.
        mismatch_weight: w.
    """
    on = DISCRIMINATOR_LOSSES[loss]
    wrong = (~same.roll(1, 1).diag()).to(real.dtype)
    on_mismatched = wrong * (on(real, mismatched) + on(real.roll(1, 0), mismatched)) / 2
    return ((1 - mismatch_weight) * on(real, fake) + mismatch_weight * on_mismatched).mean()


def diversity_loss(first: Tensor, second: Tensor, reals: Tensor, target: float) -> Tensor:
    """relu(target - d) where d is how far two drawings of a text lie apart, as a share of how far two photos do.

    Mean absolute differences; `first` and `second` (M, ...) are drawn with different noise for the same texts,
    neighbours in `reals` (N, ...) are photos of different ones. Mode-seeking (Mao et al. 2019, arXiv 1903.05628),
    bounded (Yang et al. 2019, arXiv 1901.09024): a conditional generator finds it easiest to forget its noise, and a
    discriminator that sees one drawing a text hardly notices.
    """
    apart = (first - second).abs().flatten(1).mean(1)
    photos = (reals - reals.roll(1, 0)).abs().mean()
    return F.relu(target - apart / photos.clamp(min=1e-6)).mean()


def overfitting_sign(loss: str, real: Tensor, fake: Tensor) -> float:
    """r_t = E sign D(real), ADA's measure of how sure the discriminator is (Karras et al. 2020, 2006.06676, eq. 1).

    0 is guessing, 1 is always right. Scores of wgan_gp and relativistic losses have no zero of their own, so there the
    middle between real and fake scores is taken for it.
    """
    if loss in ("wgan_gp", "relativistic"):
        real = real - (real.mean() + fake.mean()) / 2
    return real.detach().sign().mean().item()
