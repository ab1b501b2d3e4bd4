"""What a trained diffusion UNet sees in latents: frozen features for a discriminator to judge by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gigdiff.diffusion import add_noise, timesteps_of

__all__ = ["DiffusionFeatures"]


class DiffusionFeatures(torch.nn.Module):
    """Latents (N, C, h, w) -> what a frozen UNet sees in them when noised, (N, channels, h, w).

    A discriminator that starts from latents has to learn to see first; a network trained to denoise them already tells
    goods, parts and textures apart (latent adversarial diffusion distillation, Sauer et al. 2024, arXiv 2403.12015).
    The UNet is given the empty text, so that what a text has to do with the image is the discriminator's to judge and
    can't be read off features that have seen it. Noise also keeps the two distributions overlapping (Diffusion-GAN,
    Wang et al. 2023, arXiv 2206.02262): much of it leaves shapes to be judged, little of it textures.

    Features are those after the first and last level downwards, the middle and the first level upwards, of unit mean
    square at each position, on the latents' grid, mixed by one fixed random matrix (Projected GANs, Sauer et al. 2021,
    arXiv 2111.01007, section 3.2), which favours none of them and makes them fewer.

    Args:
        unet: UNet2DConditionModel of two levels or more; set to constant here.
        empty: condition (1, L, D) of the empty text.
        table: `log_sigmas` of its noise schedule.
        channels: how many features are left of the UNet's.
    """

    def __init__(self, unet: Any, empty: Tensor, table: Tensor, channels: int = 256) -> None:
        super().__init__()
        self.unet, self.empty, self.table = unet.eval().requires_grad_(False), empty, table
        self.channels = channels
        widths = unet.config["block_out_channels"]
        total = widths[0] + 3 * widths[-1]
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(channels, total, 1, 1, generator=generator) * total**-0.5
        self.mix = mix.to(empty.device)

    def forward(self, latents: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        """noise: like latents. log_sigma: (N,), the level that each is noised to; clamped to the schedule's."""
        log_sigma = log_sigma.clamp(self.table[0], self.table[-1])
        z = add_noise(latents, noise, log_sigma).contiguous(memory_format=torch.channels_last)
        condition = self.empty.expand(len(z), -1, -1)
        unet, t = self.unet, timesteps_of(log_sigma, self.table)
        # UNet2DConditionModel.forward, as far as the first level upwards.
        embedding = unet.time_embedding(unet.get_time_embed(sample=z, timestep=t))
        text = unet.get_aug_embed(emb=embedding, encoder_hidden_states=condition, added_cond_kwargs={})
        embedding = embedding if text is None else embedding + text
        x = unet.conv_in(z)
        skips, maps = [x], []
        for i, block in enumerate(unet.down_blocks):
            x, states = block(hidden_states=x, temb=embedding, **self._text(block, condition))
            skips += states
            if i in (0, len(unet.down_blocks) - 1):
                maps.append(states[len(block.resnets) - 1])  # before it is halved
        x = unet.mid_block(x, embedding, encoder_hidden_states=condition)
        maps.append(x)
        up = unet.up_blocks[0]
        below = tuple(skips[-len(up.resnets) :])
        x = up(hidden_states=x, temb=embedding, res_hidden_states_tuple=below, **self._text(up, condition))
        maps.append(x)
        size = latents.shape[-2:]
        seen = [F.interpolate(h * h.square().mean(1, keepdim=True).add(1e-6).rsqrt(), size) for h in maps]
        return F.conv2d(torch.cat(seen, 1), self.mix.to(x.dtype))

    @staticmethod
    def _text(block: Any, condition: Tensor) -> dict[str, Tensor]:
        """The argument that blocks with cross-attention take and others don't know."""
        return {"encoder_hidden_states": condition} if getattr(block, "has_cross_attention", False) else {}
