"""What fine-tuning has to know of each model family, as plain functions: what is noised how, and what the model is fed.

    mini, sd   UNet, DDPM schedule, epsilon or v (what the scheduler's config says), text tokens
    sdxl       the same, and pooled text with six size numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2)
    sd3        transformer, rectified flow, tokens and pooled text (Esser et al. 2024, arXiv 2403.03206)
    flux       transformer on packed 2 x 2 patches, rectified flow, position ids, guidance as an input

Everything else is the same for all: text comes from the generator's `embed`, latents from its autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gigdiff.diffusion import add_noise, log_sigmas, min_snr_weight, velocity
from gigdiff.errors import CapabilityError, InputError
from gigdiff.generators.diffusion import DiffusionGenerator

__all__ = ["FAMILIES", "Family", "Noised", "denoiser_of", "family_of", "noised", "to_latents"]

Condition = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: as in the header of LoRA files.
        part: where its network lies in the pipeline, and its prefix in LoRA files.
        flow: rectified flow instead of a DDPM schedule.
        predict: (network, noisy latents (N, C, h, w), timesteps (N,) on the 0 to 1000 scale, condition) -> its output.
        text_parts: the text encoders that --train_text_encoder trains.
        size_ids: whether the condition has "time_ids" (N, 6): photo's height and width, 0, 0, latents' size in pixels.
    """

    name: str
    part: str
    flow: bool
    predict: Callable[[Any, Tensor, Tensor, Condition], Tensor]
    text_parts: tuple[str, ...] = ()
    size_ids: bool = False


def predict_unet(model: Any, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Stable Diffusion's UNet, and mini's."""
    return model(z, t, encoder_hidden_states=condition["prompt_embeds"], return_dict=False)[0]


def predict_sdxl(model: Any, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """SDXL's UNet: pooled text and sizes go into the time embedding."""
    added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]}
    tokens = condition["prompt_embeds"]
    return model(z, t, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)[0]


def predict_sd3(model: Any, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """SD3's MMDiT."""
    return model(
        hidden_states=z,
        timestep=t,
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def predict_flux(model: Any, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """FLUX: 2 x 2 latents become one token; each token carries its row and column. It takes t in 0 to 1.

    FLUX.1-dev was distilled to take guidance as an input. Trained at 1 (`condition["guidance"]`), a LoRA leaves the
    distilled guidance as it is.
    """
    tokens = condition["prompt_embeds"]
    guidance = condition["guidance"] if model.config.guidance_embeds else None
    output = model(
        hidden_states=pack(z),
        timestep=t / 1000,
        guidance=guidance,
        pooled_projections=condition["pooled_prompt_embeds"],
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=z.device, dtype=z.dtype),
        img_ids=position_ids(z.shape[-2] // 2, z.shape[-1] // 2).to(z),
        return_dict=False,
    )[0]
    return unpack(output, z.shape[-2], z.shape[-1])


def pack(z: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h/2 w/2, 4 C): each 2 x 2 patch one token, row by row."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`."""
    n, _, c = tokens.shape
    return tokens.view(n, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, h, w)


def position_ids(rows: int, columns: int) -> Tensor:
    """(rows columns, 3): 0, row, column of each token."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


_CLIP = ("text_encoder", "text_encoder_2")

#: the pipeline's class -> family. gigdiff's own layout is "mini" (see `family_of`).
FAMILIES: dict[str, Family] = {
    "mini": Family("mini", "unet", False, predict_unet),
    "StableDiffusionPipeline": Family("sd", "unet", False, predict_unet, ("text_encoder",)),
    "StableDiffusionXLPipeline": Family("sdxl", "unet", False, predict_sdxl, _CLIP, size_ids=True),
    "StableDiffusion3Pipeline": Family("sd3", "transformer", True, predict_sd3, _CLIP),
    "FluxPipeline": Family("flux", "transformer", True, predict_flux, ("text_encoder",)),
}


def family_of(generator: Any) -> Family:
    """Which family a loaded generator is of.

    Raises:
        CapabilityError: none that can be fine-tuned.
    """
    kind = "mini" if isinstance(generator, DiffusionGenerator) else type(generator.pipeline).__name__
    if kind not in FAMILIES:
        raise CapabilityError(
            f"{generator.name} is a {kind}; LoRA fine-tuning knows {', '.join(FAMILIES)}. "
            "Give another --pretrained_model_name_or_path."
        )
    return FAMILIES[kind]


def denoiser_of(generator: Any, family: Family) -> Any:
    """The network that is trained."""
    return generator.unet if isinstance(generator, DiffusionGenerator) else getattr(generator.pipeline, family.part)


@torch.no_grad()
def to_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] -> the latents that the network works on, (N, C, h, w) float32."""
    latents = vae.encode(pixels).latent_dist.mode().float()
    config = vae.config
    shift = config.get("shift_factor", None) or 0.0
    return (latents - shift) * (config.get("scaling_factor", None) or 1.0)


@dataclass(frozen=True)
class Noised:
    """Network input z (N, C, h, w), timesteps (N,), target like z, weight (N,) on the squared error."""

    z: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


def noised(
    family: Family, scheduler: Any, latents: Tensor, noise: Tensor, u: Tensor, snr_gamma: float | None
) -> Noised:
    """Noisy latents and what the network should say of them.

    Args:
        family, scheduler: decide the process; the scheduler is only read.
        latents, noise: (N, C, h, w).
        u: (N,) in (0, 1), how far along the law of noise levels: uniform in training, quantiles for a held-out loss.
        snr_gamma: min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), None for none.

    Raises:
        InputError: min-SNR with rectified flow, or a prediction type that is not known.
    """
    one = torch.ones_like(u)
    if family.flow:
        if snr_gamma is not None:
            raise InputError(f"--snr_gamma is for DDPM schedules; {family.name} is trained by rectified flow. Drop it.")
        s = flow_sigmas(scheduler, u, latents.shape[-2] * latents.shape[-1] // 4)
        sigma = s.view(-1, 1, 1, 1)
        return Noised((1 - sigma) * latents + sigma * noise, 1000 * s, noise - latents, one)
    # clamped: schedules of zero terminal SNR have an infinite sigma at the end
    table = log_sigmas(scheduler.alphas_cumprod).clamp(max=15.0).to(latents.device)
    t = (u * len(table)).long().clamp(max=len(table) - 1)
    log_sigma = table[t]
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = velocity(latents, noise, log_sigma)
    elif kind == "sample":
        target = latents
    else:
        raise InputError(f"the scheduler's prediction_type is {kind!r}; known are epsilon, v_prediction and sample.")
    weight = one if snr_gamma is None else min_snr_weight(log_sigma, snr_gamma, kind)
    return Noised(add_noise(latents, noise, log_sigma), t, target, weight)


def flow_sigmas(scheduler: Any, u: Tensor, tokens: int) -> Tensor:
    """Noise levels (N,) in (0, 1) of rectified flow: logit-normal (Esser et al. 2024, section 3.1), then shifted.

    The shift is the scheduler's; FLUX's grows with the number of tokens (its `base_shift` to `max_shift`).
    """
    s = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    config = scheduler.config
    shift = float(config.get("shift", 1.0) or 1.0)
    if config.get("use_dynamic_shifting", False):
        low, high = config.base_image_seq_len, config.max_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (tokens - low) / (high - low)
        shift = math.exp(mu)
    return shift * s / (1 + (shift - 1) * s)
