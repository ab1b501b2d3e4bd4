"""The upscaler: pictures four times as high and wide, all work done at the small size.

The sub-pixel layout of Shi et al. 2016 (ESPCN, arXiv 1609.05158) with residual blocks without norms (EDSR, Lim et al.
2017, arXiv 1707.02921; ESRGAN, Wang et al. 2018, arXiv 1809.00219), on top of a bicubic enlargement: the last
convolution starts at zero, so before the first step it *is* bicubic interpolation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gigdiff.errors import ModelMismatchError, ModelNotFoundError
from gigdiff.models.autoencoder import ResidualBlock

__all__ = ["ProductUpscaler", "deepened", "interpolated", "load_upscaler_network"]


class ProductUpscaler(ModelMixin, ConfigMixin):
    """(N, 3, H, W) in [-1, 1] -> (N, 3, scale H, scale W), nominally in [-1, 1] (not clamped).

    Args:
        channels: width of every layer.
        blocks: residual blocks of two 3x3 convolutions.
        scale: enlargement each way.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, channels: int = 64, blocks: int = 10, scale: int = 4) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.conv_out = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @property
    def reach(self) -> int:
        """Input pixels each way that an output pixel depends on: two convolutions a block, first, last, bicubic."""
        return 2 * self.config["blocks"] + 2 + 2

    @property
    def flops_per_pixel(self) -> int:
        """Multiplications and additions an input pixel."""
        channels, blocks, scale = (self.config[name] for name in ("channels", "blocks", "scale"))
        return 2 * 9 * (3 * channels + blocks * 2 * channels**2 + channels * 3 * scale**2)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.config["scale"]
        h = self.conv_in(x)
        h = h + self.body(h)
        detail = F.pixel_shuffle(self.conv_out(F.silu(h)), scale)
        return F.interpolate(x, scale_factor=scale, mode="bicubic") + detail


def load_upscaler_network(folder: str | Path) -> ProductUpscaler:
    """The network that training/train_upscaler.py saved in `folder`.

    Raises:
        ModelNotFoundError: there is none. ModelMismatchError: the folder holds another model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"no upscaler in {folder}: give the upscaler/ folder of a run of training/train_upscaler.py"
        )
    try:
        return ProductUpscaler.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelMismatchError(f"{folder} does not load as a ProductUpscaler: {str(error)[:300]}") from error


def deepened(network: ProductUpscaler, channels: int, blocks: int, scale: int) -> ProductUpscaler:
    """The same function with `blocks` residual blocks: those that are added give zero until they are trained.

    Raises:
        ModelMismatchError: it has more blocks already, or other channels or another scale than these.
    """
    known = network.config
    if known["channels"] != channels or known["scale"] != scale or known["blocks"] > blocks:
        raise ModelMismatchError(
            f"the upscaler to start from has {known['channels']} channels, {known['blocks']} blocks and scale "
            f"{known['scale']}; {channels}, {blocks} and {scale} are asked for: channels and scale must be the same, "
            "and the blocks no fewer"
        )
    deeper = ProductUpscaler(channels=channels, blocks=blocks, scale=scale)
    deeper.load_state_dict(network.state_dict(), strict=False)
    return deeper


@torch.no_grad()
def interpolated(faithful: ProductUpscaler, sharp: ProductUpscaler, fidelity: float) -> ProductUpscaler:
    """fidelity * faithful + (1 - fidelity) * sharp, weight by weight (ESRGAN's network interpolation, section 3.4).

    It works because `sharp` was trained on from `faithful`. The result is `sharp`, changed in place.

    Raises:
        ModelMismatchError: they are of different shapes.
    """
    theirs: dict[str, Any] = faithful.state_dict()
    ours = sharp.state_dict()
    if {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in ours.items()}:
        raise ModelMismatchError("the faithful and the sharp upscaler have different layers and can't be mixed")
    for name, tensor in ours.items():
        tensor.lerp_(theirs[name].to(tensor), fidelity)
    return sharp
