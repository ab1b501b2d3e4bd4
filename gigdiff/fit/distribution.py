"""Distribution matching distillation: what a student draws moves to where its guided teacher finds it likelier.

Yin et al. 2023 (arXiv 2311.18828, section 3.2): the gradient, for what was drawn, of the Kullback-Leibler divergence
between the student's drawings and the teacher's distribution, both noised, is the difference of two scores. The teacher
gives one; the other is that of a network which learns to denoise the drawings alone. It is updated several times a step
(Yin et al. 2024, arXiv 2405.14867, section 4.2), without which the student runs away from it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gigdiff import rng
from gigdiff.attention import set_attention
from gigdiff.diffusion import add_noise, clean_from_velocity, velocity
from gigdiff.fit.checkpoint import load_optimizer, optimizer_tensors
from gigdiff.fit.layers import lighten
from gigdiff.fit.schedule import set_learning_rate
from gigdiff.fit.teacher import Teacher, recorded_unet, velocity_of
from gigdiff.precision import autocast_dtype

__all__ = ["DistributionMatching", "NoiseDraws", "matching_loss"]

LEVELS = (0.02, 0.98)  # of the schedule's timesteps: where drawings are noised (arXiv 2311.18828, appendix)


@dataclasses.dataclass(frozen=True)
class NoiseDraws:
    """The chances of a step: timesteps (1 + updates, N) and noise (1 + updates, N, C, h, w), the student's first."""

    timesteps: Tensor
    noise: Tensor

    @staticmethod
    def of(step: int, process: int, updates: int, shape: torch.Size, count: int, seed: int) -> NoiseDraws:
        """They depend on seed, step and process alone. shape: of the latents. count: of the schedule's timesteps."""
        generator = rng.generator(seed, f"distribution matching, process {process}", step)
        low, high = (int(share * count) for share in LEVELS)
        timesteps = torch.randint(low, high, (1 + updates, shape[0]), generator=generator)
        return NoiseDraws(timesteps, torch.randn((1 + updates, *shape), generator=generator))

    def to(self, device: torch.device) -> NoiseDraws:
        return NoiseDraws(self.timesteps.to(device), self.noise.to(device))


def matching_loss(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(N,): a loss whose gradient for a drawing is (fake - real) / mean |made - real|, over its numbers.

    Equations 7 and 8 of arXiv 2311.18828 in terms of clean estimates: the score at z is (alpha x - z) / beta^2 of the
    estimate x, and the weight makes samples of all noise levels pull alike.

    Args:
        made: what was drawn (N, C, h, w). real, fake: what the teacher and the drawings' network say that it was,
            noised, without noise; likewise, without gradient.
    """
    size = (made.detach() - real).abs().flatten(1).mean(1).clamp(min=1e-6).view(-1, *[1] * (made.ndim - 1))
    target = made.detach() - (fake - real) / size
    return 0.5 * (made - target).square().flatten(1).mean(1)


class DistributionMatching:
    """The network that knows the student's drawings, and the loss against the teacher.

    Args:
        teacher: whose distribution, with its guidance, is to be matched; the network starts as a copy of it.
        updates: of the network, a step.
    """

    def __init__(
        self, teacher: Teacher, *, updates: int, beta2: float, max_grad_norm: float, attention: str,
        mixed_precision: str, accelerator: Any,
    ) -> None:  # fmt: skip
        self.teacher, self.updates, self.max_grad_norm, self.accelerator = teacher, updates, max_grad_norm, accelerator
        self.unet = copy.deepcopy(teacher.unet).requires_grad_(True).train()
        if accelerator.device.type == "cpu":
            lighten(self.unet)
        set_attention(self.unet, attention, training=True, dtype=autocast_dtype(mixed_precision))
        self.optimizer: Any = torch.optim.AdamW(
            self.unet.parameters(), betas=(0.9, beta2), weight_decay=0.0, fused=True
        )
        self.wrapped: Any = self.unet
        self._recorded: Any = None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return {"fake_unet": dict(self.unet.state_dict()), "fake_optimizer": optimizer_tensors(optimizer)}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a checkpoint's `tensors`; before `prepare`."""
        self.unet.load_state_dict(tensors["fake_unet"])
        load_optimizer(self.optimizer, tensors["fake_optimizer"])

    def record(self, example: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
        """Let the network's passes be CUDA graphs (`recorded_unet`); before `prepare`."""
        self._recorded = recorded_unet(self.unet, example, dtype)

    def prepare(self) -> None:
        """Hand the network and its optimizer to Accelerate."""
        self.wrapped, self.optimizer = self.accelerator.prepare(self.unet, self.optimizer)

    def loss(self, made: Tensor, condition: Tensor, draws: NoiseDraws) -> Tensor:
        """`matching_loss` of the student's drawings (N, C, h, w) of texts `condition` (N, 1 + L, D)."""
        level = self.teacher.table[draws.timesteps[0]]
        with torch.no_grad(), self.accelerator.autocast():
            z = add_noise(made.detach(), draws.noise[0], level)
            real = self.teacher.clean(condition)(z, level)
            said = velocity_of(self._recorded or self.unet, z, draws.timesteps[0], condition)
            fake = clean_from_velocity(z, said, level)
        return matching_loss(made, real, fake)

    def learn(self, made: Tensor, condition: Tensor, draws: NoiseDraws, learning_rate: float) -> dict[str, float]:
        """Let the network learn what the drawings look like under noise; its last loss."""
        set_learning_rate(self.optimizer, learning_rate)
        made, loss = made.detach(), made.new_zeros(())
        for timesteps, noise in zip(draws.timesteps[1:], draws.noise[1:], strict=True):
            level = self.teacher.table[timesteps]
            with self.accelerator.autocast():
                z = add_noise(made, noise, level)
                said = velocity_of(self._recorded or self.wrapped, z, timesteps, condition)
            loss = (said - velocity(made, noise, level)).square().mean()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.unet.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"fake_loss": loss.item()}
