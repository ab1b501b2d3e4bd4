"""A discriminator that learns beside whatever draws: the adversarial half of the GAN, the VAE-GAN and distillation.

A step of a script that uses it:

    chances = adversary.chances(positions, step, shape, condition)   # all its randomness, made ahead
    looks = adversary.look(photos, drawn, chances)                   # with the gradient of `drawn`
    values = adversary.learn(looks, condition, chances, step, rate)  # the discriminator's step
    loss, more = adversary.judge(looks, condition, chances)          # what the drawing network minimises
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from gigdiff import gan_losses, rng
from gigdiff.cuda_graphs import recorded_for_training
from gigdiff.data.encoded import EncodedProducts
from gigdiff.errors import InputError
from gigdiff.fit.augmentation import DRAWS, AdaptiveStrength, augment
from gigdiff.fit.checkpoint import load_optimizer, optimizer_tensors
from gigdiff.fit.run import check_finite
from gigdiff.fit.schedule import set_learning_rate
from gigdiff.fit.teacher import frozen_unet
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.models.autoencoder import visibility
from gigdiff.models.diffusion_features import DiffusionFeatures
from gigdiff.models.text_discriminator import Judgement, TextDiscriminator

__all__ = ["Adversary", "AdversarySettings", "Chances", "Looks", "View", "diffusion_features", "view_of"]


@dataclasses.dataclass(frozen=True)
class AdversarySettings:
    """What the discriminator is and how it learns; the scripts' flags of the same names, explained there."""

    seed: int
    discriminator_widths: tuple[int, ...]
    discriminator_blocks: tuple[int, ...]
    discriminator_learning_rate: float
    penalty_weight: float
    penalty_interval: int
    penalty_noise: float
    mismatch_weight: float
    contrastive_weight: float
    penalty_method: str = "finite_difference"
    loss: str = "relativistic"
    penalty: str = "auto"
    discriminator_log_sigma_mean: float = -1.0
    discriminator_log_sigma_std: float = 1.2
    augment: str = "none"
    augment_probability: float = 0.3
    augment_target: float = 0.6
    augment_images: int = 500_000
    augment_shift: float = 0.125
    augment_cutout: float = 0.5
    augment_flip: bool = False
    adam_beta1: float = 0.0
    adam_beta2: float = 0.99

    @classmethod
    def of(cls, config: Any) -> Self:
        """Those of a script's config that it has, the defaults for the rest.

        Raises:
            InputError: a value that makes no sense.
        """
        names = [field.name for field in dataclasses.fields(cls) if hasattr(config, field.name)]
        values = {name: getattr(config, name) for name in names}
        if values["penalty_interval"] is None:
            # Between two penalties nothing holds a Wasserstein critic: one clipped step in four did not bring it back.
            values["penalty_interval"] = 1 if cls(**values).penalty_kind == "wgan_gp" else 4
        settings = cls(**values)
        if not 0 <= settings.mismatch_weight < 1:
            raise InputError(f"--mismatch_weight is {settings.mismatch_weight:g}; at least 0 and below 1 is allowed")
        if settings.penalty_interval < 1 or config.train_batch_size < 2:
            raise InputError(
                f"--penalty_interval is {settings.penalty_interval}, at least 1 is needed; --train_batch_size is "
                f"{config.train_batch_size}, at least 2 is needed (another product's text makes a mismatch)"
            )
        return settings

    @property
    def penalty_kind(self) -> str:
        """The penalty that is meant."""
        return gan_losses.RECOMMENDED_PENALTY[self.loss] if self.penalty == "auto" else self.penalty

    @property
    def finite(self) -> bool:
        """Whether the penalty is taken by finite differences."""
        return self.penalty_method == "finite_difference" and self.penalty_kind in ("r1", "r1_r2")

    def penalised(self, step: int) -> bool:
        """Whether `step` takes a penalty."""
        return self.penalty_kind != "none" and step % self.penalty_interval == 0


@dataclasses.dataclass(frozen=True)
class View:
    """What the discriminator sees of images: themselves, each channel as much as it shows, and a UNet's features.

    weights: (1, C, 1, 1). channels: of what is seen.
    """

    weights: Tensor
    features: DiffusionFeatures | None

    @property
    def channels(self) -> int:
        return self.weights.shape[1] + (0 if self.features is None else self.features.channels)

    def __call__(self, images: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        shown = images * self.weights
        if self.features is None:
            return shown
        found = self.features(images, noise, log_sigma)
        return torch.cat([shown.to(found.dtype), found], 1)


def view_of(vae: Any, held_out: EncodedProducts, features: DiffusionFeatures | None, device: torch.device) -> View:
    """The view of an autoencoder's latents, channels weighed on held-out ones; of pixels where `vae` is None."""
    if vae is None:
        return View(torch.ones(1, 3, 1, 1, device=device), None)
    return View(visibility(vae, held_out.latents(list(range(min(64, len(held_out))))).to(device)), features)


def diffusion_features(drawing: DiffusionGenerator, mixed_precision: str, device: torch.device) -> DiffusionFeatures:
    """What the UNet of `drawing` sees, given the empty text."""
    return DiffusionFeatures(*frozen_unet(drawing, mixed_precision, device))


@dataclasses.dataclass(frozen=True)
class Chances:
    """A step's random numbers, each a function of seed and position: same bool (N, N): equal texts, draws uniform
    (N, 2 * DRAWS + 1), penalty_noise (2 N, *what is seen) or empty, view_noise like images and log_sigma (N,): the
    noise that a UNet's features are looked at through, or empty."""

    same: Tensor
    draws: Tensor
    penalty_noise: Tensor
    view_noise: Tensor
    log_sigma: Tensor

    def to(self, device: torch.device) -> Chances:
        return Chances(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


class Looks(NamedTuple):
    """What the discriminator sees of photos and of drawings, (N, channels, h, w) each."""

    real: Tensor
    fake: Tensor


class Adversary:
    """A TextDiscriminator, its optimizer and augmentation.

    Args:
        settings: how it learns.
        view: what it sees of images.
        size: rows and columns of them: latent positions or pixels.
        fold: as the generator's.
        text_dim: numbers a token of conditions.
        accelerator: of the script.
    """

    def __init__(
        self,
        settings: AdversarySettings,
        view: View,
        *,
        size: tuple[int, int],
        fold: int,
        text_dim: int,
        accelerator: Accelerator,
    ) -> None:
        self.settings, self.view, self.accelerator = settings, view, accelerator
        critic = TextDiscriminator(
            channels=view.channels,
            height=size[0],
            width=size[1],
            fold=fold,
            widths=settings.discriminator_widths,
            blocks=settings.discriminator_blocks,
            text_dim=text_dim,
        )
        # Channels last is what the CPU's and the tensor cores' convolutions want.
        self.critic = critic.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        betas = (settings.adam_beta1, settings.adam_beta2)
        rate = settings.discriminator_learning_rate
        optimizer = torch.optim.Adam(self.critic.parameters(), lr=rate, betas=betas, fused=True)
        self._wrapped, self.optimizer = self.critic, optimizer
        self.strength = AdaptiveStrength(settings.augment_target, settings.augment_images)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its part of a checkpoint."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return {
            "discriminator": dict(self.critic.state_dict()),
            "discriminator_optimizer": optimizer_tensors(optimizer),
            "augmentation": self.strength.tensors(),
        }

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Continue from a checkpoint's `tensors`; RuntimeError or KeyError where they are of another discriminator."""
        self.critic.load_state_dict(tensors["discriminator"])
        load_optimizer(self.optimizer, tensors["discriminator_optimizer"])
        self.strength.load(tensors["augmentation"])

    def record(self, like: Tensor, dtype: torch.dtype) -> None:
        """Let a UNet's features of images `like` (N, C, h, w) be found by CUDA graphs."""
        if self.view.features is not None:
            images = torch.zeros_like(like).requires_grad_()  # the drawn ones' gradients go through them
            example = (images, torch.zeros_like(like), like.new_zeros(len(like)))
            recorded_for_training(self.view.features, example, dtype)

    def prepare(self) -> None:
        """Hand networks over to Accelerate, once they are loaded."""
        self._wrapped, self.optimizer = self.accelerator.prepare(self.critic, self.optimizer)

    def view_noise(self, shape: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(noise, log sigma) that a UNet's features of images of `shape` are looked at through; else empty."""
        if self.view.features is None:
            return torch.empty(0), torch.empty(0)
        s = self.settings
        law = rng.normal((1,), s.seed, "view level", positions)[:, 0]
        level = s.discriminator_log_sigma_mean + s.discriminator_log_sigma_std * law
        return rng.normal(shape, s.seed, "view noise", positions), level

    def chances(self, positions: Sequence[int], step: int, shape: Sequence[int], condition: Tensor) -> Chances:
        """The randomness of `step` for images of `shape` (C, h, w) at `positions` of the endless stream.

        condition: (N, 1 + L, D), as encoded: before any noise on it.
        """
        seed, penalty_noise = self.settings.seed, torch.empty(0)
        if self.settings.finite and self.settings.penalised(step):
            seen = (self.view.channels, *shape[1:])
            both = [rng.normal(seen, seed, f"penalty noise {i}", positions) for i in range(2)]
            penalty_noise = torch.cat(both)
        same = (condition[:, None, 0] == condition[None, :, 0]).all(-1)
        draws = rng.uniform(2 * DRAWS + 1, seed, "augmentation", positions)
        return Chances(same, draws, penalty_noise, *self.view_noise(shape, positions))

    def look(self, real: Tensor, fake: Tensor, chances: Chances) -> Looks:
        """What is seen of photos and of drawings (N, C, h, w), augmented; the latter with their gradient."""
        with self.accelerator.autocast():
            return Looks(
                *(
                    self.view(self._augmented(images, chances, use), chances.view_noise, chances.log_sigma)
                    for use, images in enumerate((real, fake))
                )
            )

    def learn(self, looks: Looks, condition: Tensor, chances: Chances, step: int, rate: float) -> dict[str, float]:
        """One optimizer step: real photos, drawn ones, and real photos with another product's text.

        Returns:
            discriminator_loss, contrast_real, penalty, r_t, augment_probability, discriminator_grad_norm.

        Raises:
            NumericalError: the loss is not finite.
        """
        s, accelerator = self.settings, self.accelerator
        set_learning_rate(self.optimizer, rate)
        self.critic.requires_grad_(True)
        fake = looks.fake.detach()
        judged: Judgement = self._wrapped(torch.cat([looks.real, fake]), condition)
        real_scores, fake_scores = judged.scores
        sign = gan_losses.overfitting_sign(s.loss, real_scores, fake_scores)
        loss = gan_losses.critic_loss(
            s.loss, real_scores, fake_scores, judged.mismatched, chances.same, s.mismatch_weight
        )
        contrast = gan_losses.contrastive_loss(judged.similarity, chances.same)
        values = {"discriminator_loss": loss.item(), "contrast_real": contrast.item()}
        loss = loss + s.contrastive_weight * contrast
        if s.penalised(step):
            penalty = self._penalty(looks.real, fake, judged.scores, condition, chances)
            values["penalty"] = penalty.item()
            loss = loss + s.penalty_weight * s.penalty_interval * penalty
        check_finite(loss.item(), step, rate)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.critic.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Averaged over processes, which must go on augmenting alike.
        sign = float(accelerator.reduce(torch.tensor(sign, device=looks.real.device), "mean"))
        self.strength.see(sign, len(looks.real) * accelerator.num_processes)
        return values | {
            "r_t": sign,
            "augment_probability": self.strength.probability,
            "discriminator_grad_norm": float(norm),
        }

    def judge(self, looks: Looks, condition: Tensor, chances: Chances) -> tuple[Tensor, dict[str, float]]:
        """What the drawing network minimises, by the discriminator as it now is, whose weights get no gradients.

        Returns:
            Its loss with the contrastive term, and {adversarial_loss, contrast_fake} for the log.
        """
        s = self.settings
        self.critic.requires_grad_(False)
        judged: Judgement = self._wrapped(looks.fake, condition)
        with torch.no_grad():  # only the relativistic loss looks at the photos
            on_photos = self._wrapped(looks.real, condition) if s.loss == "relativistic" else judged
            real_scores = on_photos.scores[0].detach()
        loss = gan_losses.GENERATOR_LOSSES[s.loss](real_scores, judged.scores[0]).mean()
        contrast = gan_losses.contrastive_loss(judged.similarity, chances.same)
        values = {"adversarial_loss": loss.item(), "contrast_fake": contrast.item()}
        return loss + s.contrastive_weight * contrast, values

    def _augmented(self, images: Tensor, chances: Chances, use: int) -> Tensor:
        s = self.settings
        probability = {"none": 0.0, "fixed": s.augment_probability, "adaptive": self.strength.probability}[s.augment]
        draws = chances.draws[:, use * DRAWS : (use + 1) * DRAWS]
        return augment(images, draws, probability, shift=s.augment_shift, cutout=s.augment_cutout, flip=s.augment_flip)

    def _penalty(self, real: Tensor, fake: Tensor, scores: Tensor, condition: Tensor, chances: Chances) -> Tensor:
        """The gradient penalty where `scores` (2, N) are those of real and fake: exact, or by finite differences."""
        s = self.settings
        if s.penalty_kind == "wgan_gp":
            # Also between a text's photo and the photo that it is a mismatch for: left free there, D grew without end.
            wrong = torch.arange(len(real), device=real.device) < round(s.mismatch_weight * len(real))
            ends = torch.where(wrong[:, None, None, None], real.roll(-1, 0), fake)
            images = gan_losses.interpolate(real, ends, chances.draws[:, -1])
            return gan_losses.unit_gradient_penalty(self._wrapped(images, condition).scores, images)
        images = (real if s.penalty_kind == "r1" else torch.cat([real, fake])).detach()
        if not s.finite:
            images = images.requires_grad_()
            return gan_losses.gradient_penalty(self._wrapped(images, condition).scores, images)
        noisy = images + s.penalty_noise * chances.penalty_noise[: len(images)]
        noisy_scores = self._wrapped(noisy, condition).scores
        return gan_losses.finite_difference_penalty(scores[: len(noisy_scores)], noisy_scores, s.penalty_noise)
