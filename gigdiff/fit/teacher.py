"""A frozen diffusion UNet as a teacher: what it says that noisy latents were without noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gigdiff.attention import set_attention
from gigdiff.consistency import huber
from gigdiff.cuda_graphs import recorded_for_training
from gigdiff.diffusion import add_noise, clean_from_velocity, guided, log_sigmas, timesteps_of
from gigdiff.errors import ModelMismatchError
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.generators.loading import load
from gigdiff.generators.shared_vae import same_encoder
from gigdiff.models.autoencoder import ProductAutoencoder
from gigdiff.precision import autocast_dtype

__all__ = ["Teacher", "Velocity", "fellow_model", "frozen_unet", "recorded_unet", "velocity_of"]


def fellow_model(flag: str, name: str, vae: ProductAutoencoder, vae_flag: str) -> DiffusionGenerator:
    """The diffusion model `name`, given by `flag`, on the CPU; it draws the latents of `vae`, given by `vae_flag`.

    Raises:
        ModelMismatchError: no diffusion model of gigdiff's, one on other latents, or one that predicts no velocities.
    """
    drawing, what = load(name, device="cpu"), f"{flag} {name}"
    if not isinstance(drawing, DiffusionGenerator):
        raise ModelMismatchError(f'{what} is no model of training/train_diffusion.py: give such a folder, or "mini"')
    if not same_encoder(drawing.vae, vae):
        raise ModelMismatchError(f"{what} draws other latents than {vae_flag} gives")
    if drawing.scheduler.config["prediction_type"] != "v_prediction":
        raise ModelMismatchError(f'{what} is no v-prediction model: give such a folder, or "mini"')
    return drawing


def frozen_unet(drawing: DiffusionGenerator, mixed_precision: str, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """The UNet of `drawing` in the layout and attention that training wants, the empty text's condition, and the
    `log_sigmas` of its schedule."""
    unet = drawing.unet.to(device, memory_format=torch.channels_last).requires_grad_(False)
    set_attention(unet, "auto", training=True, dtype=autocast_dtype(mixed_precision))
    empty = drawing.text_encoder.encode([""]).condition().to(device)
    return unet, empty, log_sigmas(drawing.scheduler.alphas_cumprod).to(device)


def velocity_of(unet: Any, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """What a UNet predicts for z (N, C, h, w) at timesteps t (N,), float32."""
    z = z.contiguous(memory_format=torch.channels_last)
    return unet(z, t, encoder_hidden_states=condition, return_dict=False)[0].float()


class Velocity(nn.Module):
    """A UNet as a function of tensors: noisy latents (N, C, h, w), timesteps (N,), conditions (N, 1 + L, D)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, encoder_hidden_states=condition, return_dict=False)[0]


def recorded_unet(unet: nn.Module, example: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Callable[..., Any]:
    """What `velocity_of` takes as `unet`, by `recorded_for_training`. example: as `Velocity` takes them."""
    network = recorded_for_training(Velocity(unet), example, dtype)

    def call(z: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (network(z, t, encoder_hidden_states),)

    return call


class Teacher:
    """A v-prediction UNet with classifier-free guidance.

    Args:
        unet: frozen. empty: the empty prompt's condition (1, 1 + L, D). guidance_scale: 1 is none, and one pass only.
        table: `log_sigmas` of its schedule.
    """

    def __init__(self, unet: Any, empty: Tensor, guidance_scale: float, table: Tensor) -> None:
        self.unet, self.empty, self.scale, self.table = unet, empty, guidance_scale, table

    def clean(self, condition: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(z (N, C, h, w), log_sigma (N,)) -> the estimate of the clean latents for texts `condition` (N, 1 + L, D)."""
        both = torch.cat([self.empty.expand_as(condition), condition])

        def estimate(z: Tensor, log_sigma: Tensor) -> Tensor:
            t = timesteps_of(log_sigma, self.table)
            if self.scale == 1.0:
                return clean_from_velocity(z, velocity_of(self.unet, z, t, condition), log_sigma)
            unconditional, conditional = velocity_of(self.unet, z.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return clean_from_velocity(z, guided(unconditional, conditional, self.scale), log_sigma)

        return estimate

    def record(self, z: Tensor, condition: Tensor, dtype: torch.dtype) -> None:
        """Take CUDA graphs (`recorded_unet`) for batches like z (N, C, h, w) and `condition` (N, 1 + L, D)."""
        rows = 1 if self.scale == 1.0 else 2
        z = z.repeat(rows, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        t = timesteps_of(self.table[:1].expand(len(z)), self.table)
        self.unet = recorded_unet(self.unet, (z, t.clone(), condition.repeat(rows, 1, 1)), dtype)

    def correction(self, made: Tensor, noise: Tensor, log_sigma: Tensor, condition: Tensor, weights: Tensor) -> Tensor:
        """How far the teacher would move what was drawn, were it noised: adversarial diffusion distillation's loss.

        Equation 4 of Sauer et al. 2023 (arXiv 2311.17042), the teacher's answer without gradient, with the pseudo-Huber
        distance in place of the squared one: a noisy level, where the answer is far off and vague, does not drown one
        that corrects details.

        Args:
            made: (N, C, h, w), with gradient. noise: like it. log_sigma: (N,), clamped to the schedule's.
            weights: (1, C, 1, 1): what each channel counts.

        Returns:
            (N,), in root mean squares of an image.
        """
        log_sigma = log_sigma.clamp(self.table[0], self.table[-1])
        with torch.no_grad():
            end = self.clean(condition)(add_noise(made, noise, log_sigma), log_sigma)
        return huber(made * weights, end * weights) / made[0].numel() ** 0.5
