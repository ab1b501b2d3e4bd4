"""Augmentation that gradients pass through, for a discriminator that sees few photos, and its adaptive strength.

What is allowed differs by what is drawn. Latents may be shifted by whole positions and have a part blanked; mirroring
them would not mirror the picture, since a position's channels code the inside of its 8x8 pixels. Pixels may be mirrored
too. Nothing here changes colours: a caption names them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DRAWS", "AdaptiveStrength", "augment"]

DRAWS = 7  # uniform numbers an image


def augment(images: Tensor, draws: Tensor, probability: float, *, shift: float, cutout: float, flip: bool) -> Tensor:
    """Each transform is applied to each image with `probability`, the same image alone or in any batch.

    Differentiable augmentation (Zhao et al. 2020, DiffAugment, arXiv 2006.10738): reals and fakes are both transformed,
    and the generator's gradient passes through. Below a probability of about 0.8 the transforms don't leak into what is
    drawn (Karras et al. 2020, arXiv 2006.06676, section 2.2).

    Args:
        images: (N, C, H, W). draws: uniform [0, 1) (N, DRAWS).
        shift: by up to this share of the size each way; what comes in repeats the edge (white, for photos on white).
        cutout: side of the square set to zero (mean latents, grey), as a share of the size.
        flip: mirror left and right.
    """
    if probability == 0:
        return images
    use_shift, use_cutout = (draws[:, i, None] < probability for i in (0, 3))
    height, width = images.shape[2:]
    rows = _source(draws[:, 1, None], use_shift, height, shift)
    columns = _source(draws[:, 2, None], use_shift, width, shift)
    if flip:
        columns = torch.where(draws[:, 6, None] < probability / 2, width - 1 - columns, columns)
    keep_rows = _outside(draws[:, 4, None], height, cutout)
    keep_columns = _outside(draws[:, 5, None], width, cutout)
    keep = keep_rows[:, :, None] | keep_columns[:, None, :] | ~use_cutout[:, :, None]
    # A shift is a product with matrices of zeros and ones: exact, differentiable as often as one likes.
    down = torch.nn.functional.one_hot(rows, height).to(images.dtype)[:, None]
    right = torch.nn.functional.one_hot(columns, width).to(images.dtype)[:, None]
    with torch.autocast(images.device.type, enabled=False):
        moved = down @ images @ right.transpose(2, 3)
    return (moved * keep[:, None]).contiguous(memory_format=torch.channels_last)


def _source(draw: Tensor, use: Tensor, size: int, share: float) -> Tensor:
    """For each place 0 .. size - 1 the place its content comes from: (N, 1) draws -> (N, size)."""
    most = round(size * share)
    offset = torch.where(use, (draw * (2 * most + 1)).long() - most, 0)
    return (torch.arange(size, device=draw.device) + offset).clamp(0, size - 1)


def _outside(draw: Tensor, size: int, share: float) -> Tensor:
    """(N, 1) draws -> bool (N, size): True outside a stretch of `share` of the size around the place drawn."""
    half = size * share / 2
    place = torch.arange(size, device=draw.device) + 0.5
    return (place - draw * size).abs() >= half


class AdaptiveStrength:
    """ADA's controller (arXiv 2006.06676, section 3): more augmentation while the discriminator is too sure.

    r, a running mean of r_t (see `gan_losses.overfitting_sign`), is held near `target` by moving the probability up or
    down at a rate that would take it from 0 to 1 in `images_to_full` images.
    """

    def __init__(self, target: float, images_to_full: int, most: float = 0.8) -> None:
        self.target, self.images_to_full, self.most = target, images_to_full, most
        self.probability, self.overfitting = 0.0, 0.0

    def see(self, sign: float, images: int) -> None:
        """Fold in r_t of one step of `images` images."""
        self.overfitting += 0.02 * (sign - self.overfitting)
        direction = 1 if self.overfitting > self.target else -1
        self.probability = min(self.most, max(0.0, self.probability + direction * images / self.images_to_full))

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint, in double precision: every bit of it."""
        return {"state": torch.tensor([self.probability, self.overfitting], dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.probability, self.overfitting = tensors["state"].tolist()
