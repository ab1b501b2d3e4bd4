"""InceptionV3 as the FID papers use it: TensorFlow's 2015 graph with torch-fidelity's conversion of its weights.

Szegedy et al., arXiv 1512.00567. The weights (Apache-2.0, 91 MB) are not shipped: give the file, or let it be
downloaded once into torch.hub's folder. Batch norms are folded into the convolutions on loading, memory is
channels_last. What differs from torchvision's InceptionV3, and must not: average pools leave padding out of the mean,
the last block pools by maximum, and the resize is TensorFlow 1's bilinear one, which does not antialias.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError, NumericalError
from gigdiff.metrics.efficientnet import channels_last
from gigdiff.metrics.features import check_images

__all__ = ["InceptionFeatures", "InceptionV3", "fold", "load_inception", "resize_tensorflow1"]

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
HASH_PREFIX = "6726825d"  # of the file's sha256, as its name says
BATCH_NORM_EPS = 1e-3

# A convolution is (name, output channels, kernel height, kernel width); one that ends in a stride has it fifth.
# Those at stride 1 keep the size, those at stride 2 are not padded. A branch is a chain of convolutions, after an
# average or maximum pool where it starts with one; two convolutions in a list read the same input, side by side.
Conv = tuple[str, int, int, int] | tuple[str, int, int, int, int]
Branch = tuple[str | Conv | list[Conv], ...]


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 64, 1, 1),),
        (("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)),
        (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)),
        ("average", ("branch_pool", pooled, 1, 1)),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 192, 1, 1),),
        (("branch7x7_1", inner, 1, 1), ("branch7x7_2", inner, 1, 7), ("branch7x7_3", 192, 7, 1)),
        (
            ("branch7x7dbl_1", inner, 1, 1), ("branch7x7dbl_2", inner, 7, 1), ("branch7x7dbl_3", inner, 1, 7),
            ("branch7x7dbl_4", inner, 7, 1), ("branch7x7dbl_5", 192, 1, 7),
        ),
        ("average", ("branch_pool", 192, 1, 1)),
    )  # fmt: skip


def _e(pool: str) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 320, 1, 1),),
        (("branch3x3_1", 384, 1, 1), [("branch3x3_2a", 384, 1, 3), ("branch3x3_2b", 384, 3, 1)]),
        (
            ("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3),
            [("branch3x3dbl_3a", 384, 1, 3), ("branch3x3dbl_3b", 384, 3, 1)],
        ),
        (pool, ("branch_pool", 192, 1, 1)),
    )  # fmt: skip


STEM: tuple[tuple[str, int, int, int, int, int], ...] = (  # name, input, output, kernel, stride, padding
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 80, 192, 3, 1, 0),
)
POOL_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        (("branch3x3", 384, 3, 3, 2),),
        (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3, 2)),
        ("halve",),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": (
        (("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3, 2)),
        (
            ("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1),
            ("branch7x7x3_4", 192, 3, 3, 2),
        ),
        ("halve",),
    ),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}  # fmt: skip
FEATURES, CLASSES = 2048, 1008


class Block(nn.Module):
    """Branches side by side over one input, their outputs joined along the channels."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.outputs = 0
        for branch in branches:
            channels = inputs
            for step in branch:
                convs = [step] if isinstance(step, tuple) else step if isinstance(step, list) else []
                for name, outputs, height, width, *stride in convs:
                    padding = (0, 0) if stride else (height // 2, width // 2)
                    conv = nn.Conv2d(channels, outputs, (height, width), stride[0] if stride else 1, padding)
                    self.add_module(name, conv)
                channels = sum(conv[1] for conv in convs) or channels
            self.outputs += channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._run(x, branch) for branch in self.branches], dim=1)

    def _run(self, x: torch.Tensor, branch: Branch) -> torch.Tensor:
        for step in branch:
            if step == "average":
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif step == "maximum":
                x = F.max_pool2d(x, 3, 1, 1)
            elif step == "halve":
                x = F.max_pool2d(x, 3, 2)
            elif isinstance(step, list):
                x = torch.cat([F.relu(self.get_submodule(conv[0])(x), inplace=True) for conv in step], dim=1)
            else:
                x = F.relu(self.get_submodule(step[0])(x), inplace=True)
        return x


class InceptionV3(nn.Module):
    """The network up to its 2,048 pooled features, and the classifier; batch norms folded, for inference only."""

    def __init__(self) -> None:
        super().__init__()
        for name, inputs, outputs, kernel, stride, padding in STEM:
            self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, padding))
        channels = STEM[-1][2]
        for name, branches in BLOCKS.items():
            block = Block(channels, branches)
            self.add_module(name, block)
            channels = block.outputs
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, 299, 299) -> pooled features (N, 2048)."""
        for name, *_ in STEM:
            x = F.relu(self.get_submodule(name)(x), inplace=True)
            if name in POOL_AFTER:
                x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class InceptionFeatures:
    """The 2,048 pooled features that FID is defined on.

    Any size is brought to 299 x 299 by TensorFlow 1's bilinear resize, then (x - 128) / 128, as in the original graph.
    With the official weights a Fréchet distance over these is the FID of torch-fidelity and torchmetrics.

    Args:
        net: the network, loaded. digest: of its weights, part of the name.
        dtype: torch.bfloat16 is faster where the processor has it; it is part of the name too.
    """

    dim = FEATURES
    resize = "TensorFlow 1 bilinear (not antialiased), float32, to 299 x 299"

    def __init__(
        self, net: InceptionV3, digest: str, *, dtype: torch.dtype = torch.float32, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, at least 1 is needed")
        self.net, self.dtype, self.batch_size = net, dtype, batch_size
        self.name = f"inception-v3-{digest}-299x299" + ("-bf16" if dtype == torch.bfloat16 else "")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, 2048)."""
        check_images(images)
        out = np.empty((len(images), self.dim), np.float32)
        with torch.inference_mode(), torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            for start in range(0, len(images), self.batch_size):
                x = torch.from_numpy(images[start : start + self.batch_size]).permute(0, 3, 1, 2).float()
                x = (resize_tensorflow1(x, 299, 299) - 128.0) / 128.0
                x = self.net(x.contiguous(memory_format=torch.channels_last))
                out[start : start + len(x)] = x.float().numpy()
        if not np.isfinite(out).all():
            raise NumericalError(f"{self.name} gave NaN or infinite features")
        return out


def resize_tensorflow1(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resize of (N, C, H, W) as TensorFlow 1 did by default: output i samples input i * H / height."""

    def along(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        given = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32) * (given / size)
        low = at.floor().long().clamp_(max=given - 1)
        high = (low + 1).clamp_(max=given - 1)
        shape = [1] * x.ndim
        shape[dim] = size
        share = (at - low).reshape(shape)
        return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)

    return along(along(x, 2, height), 3, width)


def load_inception(
    weights: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32
) -> InceptionFeatures:
    """The extractor with torch-fidelity's weights: the file given, else torch.hub's copy, else downloaded once.

    Raises:
        ModelNotFoundError: no such file, or it can't be downloaded. ModelMismatchError: it holds something else.
    """
    path = _weights_path(weights)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    if weights is None and digest != HASH_PREFIX:
        raise ModelMismatchError(f"{path} is not torch-fidelity's file (sha256 {digest}...): delete it and try again")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
        net = InceptionV3()
        net.load_state_dict(fold(net, raw))
    except Exception as error:  # torch raises many kinds for a file that is no state dict, or one of another network
        raise ModelMismatchError(
            f"{path} does not hold torch-fidelity's InceptionV3 ({type(error).__name__}: {str(error)[:200]}); "
            f"its weights are {URL}"
        ) from error
    return InceptionFeatures(channels_last(net), digest, dtype=dtype)


def _weights_path(weights: str | os.PathLike[str] | None) -> Path:
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ModelNotFoundError(f"InceptionV3's weights: there is no file {path}; get them from {URL}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH_PREFIX, progress=False)
        except (OSError, RuntimeError) as error:
            raise ModelNotFoundError(
                f"InceptionV3's weights are neither at {path} nor reachable at {URL} ({error}): copy the file there, "
                'or name it with --extractor "inception-v3:/path/to/file.pth"'
            ) from error
    return path


def fold(net: InceptionV3, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torch-fidelity's weights for our modules: with s = gamma / sqrt(var + eps), w' = w s and b' = beta - mean s."""
    folded = {"fc.weight": raw["fc.weight"], "fc.bias": raw["fc.bias"]}
    for name in _convolutions(net):
        scale = raw[f"{name}.bn.weight"] * torch.rsqrt(raw[f"{name}.bn.running_var"] + BATCH_NORM_EPS)
        folded[f"{name}.weight"] = raw[f"{name}.conv.weight"] * scale[:, None, None, None]
        folded[f"{name}.bias"] = raw[f"{name}.bn.bias"] - raw[f"{name}.bn.running_mean"] * scale
    return folded


def _convolutions(net: InceptionV3) -> Iterator[str]:
    return (name for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
