"""Classifiers that read an attribute off a product photo: what was drawn, against what was asked for.

A probe is a small classifier over fixed features, fitted once on real train photos by `benchmarks/fit_probes.py` and
shipped in gigdiff/pretrained/probes, so that everybody's scores come from the same probe. Its accuracy on real
validation photos is the ceiling for generated ones, on images of other products (shuffled prompts) the floor.
"""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import nn
from torch.nn import functional as F

from gigdiff.errors import InputError, ModelNotFoundError, NumericalError, nearest
from gigdiff.metrics.colour import ColourHistogram
from gigdiff.metrics.features import EfficientNetLite0Features, FeatureExtractor, cached_features
from gigdiff.products import Product

__all__ = ["PROBES", "TARGETS", "Probe", "bootstrap_interval", "fit_probe", "load_probe", "probe_features", "target_of"]

PROBES = Path(__file__).parent.parent / "pretrained" / "probes"
# What each probe is asked for, as the catalogue says it; None where the catalogue does not say.
TARGETS: Mapping[str, Callable[[Product], str | None]]
INPUTS: Mapping[str, Callable[[], FeatureExtractor]] = {
    EfficientNetLite0Features.name: EfficientNetLite0Features,
    ColourHistogram.name: ColourHistogram,
}


@dataclass(frozen=True)
class Probe:
    """A linear classifier, or one with a hidden ReLU layer, over the concatenated features of `inputs`.

    Attributes:
        name: "article_type", "colour_group" or "gender".
        classes: what it tells apart, in the order of its outputs.
        inputs: names of the extractors whose features it reads, concatenated in this order.
        layers: (weight float32 (out, in), bias float32 (out,)) each, ReLU between; standardisation is folded in.
        details: how it was fitted: counts, settings, accuracy on real validation photos.
    """

    name: str
    classes: tuple[str, ...]
    inputs: tuple[str, ...]
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Extractor name -> features (N, D) gives log-probabilities float32 (N, classes)."""
        missing = [name for name in self.inputs if name not in features]
        if missing:
            given = ", ".join(features) or "none"
            raise InputError(f"the {self.name} probe reads {', '.join(missing)}; given: {given}")
        x = np.concatenate([features[name] for name in self.inputs], axis=1)
        if not np.isfinite(x).all():
            raise NumericalError(f"features for the {self.name} probe hold NaN or infinity; check the images")
        if x.shape[1] != self.layers[0][0].shape[1]:
            raise InputError(f"the {self.name} probe reads {self.layers[0][0].shape[1]} features, {x.shape[1]} given")
        for i, (weight, bias) in enumerate(self.layers):
            x = (np.maximum(x, 0.0) if i else x) @ weight.T + bias
        x = x - x.max(axis=1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)), np.float32)

    def predict(self, features: Mapping[str, np.ndarray]) -> list[str]:
        """The likeliest class of each image."""
        return [self.classes[i] for i in self.scores(features).argmax(axis=1)]

    def correct(self, features: Mapping[str, np.ndarray], products: Sequence[Product]) -> np.ndarray:
        """1.0 where the probe reads what the product is, 0.0 where not, NaN where its class is none of the probe's."""
        wanted = [target_of(self.name, product) for product in products]
        read = self.predict(features)
        if len(read) != len(wanted):
            raise InputError(f"{len(read)} images and {len(wanted)} products were given; one an image is needed")
        known = set(self.classes)
        return np.array([float(r == w) if w in known else np.nan for r, w in zip(read, wanted, strict=True)])

    def save(self, folder: Path) -> None:
        """Writes <name>.safetensors, in half precision, and <name>.json, each under a temporary name first."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for i, (weight, bias) in enumerate(self.layers):
            tensors[f"{i}.weight"] = np.ascontiguousarray(weight, np.float16)
            tensors[f"{i}.bias"] = np.ascontiguousarray(bias, np.float16)
        described = {"name": self.name, "inputs": self.inputs, "classes": self.classes, "details": dict(self.details)}
        temporary = folder / f".{self.name}-{uuid.uuid4().hex[:8]}"
        try:
            temporary.write_bytes(save(tensors))  # save_file would leave it readable by its owner alone
            os.replace(temporary, folder / f"{self.name}.safetensors")
            temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, folder / f"{self.name}.json")
        finally:
            temporary.unlink(missing_ok=True)


def _article_type(product: Product) -> str | None:
    return product.category


def _colour_group(product: Product) -> str | None:
    from gigdiff.data.vocabulary import colour_group

    return colour_group(product.colour)


def _gender(product: Product) -> str | None:
    return product.gender


TARGETS = {"article_type": _article_type, "colour_group": _colour_group, "gender": _gender}


def target_of(probe: str, product: Product) -> str | None:
    """What the probe of that name ought to read off a photo of the product; None where the catalogue doesn't say."""
    if probe not in TARGETS:
        raise InputError(f'unknown probe "{probe}"; {nearest(probe, TARGETS)}')
    return TARGETS[probe](product)


@functools.cache
def load_probe(name: str, folder: Path = PROBES) -> Probe:
    """The shipped probe of that name: "article_type", "colour_group", "gender"."""
    if name not in TARGETS:
        raise InputError(f'unknown probe "{name}"; {nearest(name, TARGETS)}')
    described, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    for path in (described, weights):
        if not path.is_file():
            raise ModelNotFoundError(f"{path} is missing; fit the probes with: python benchmarks/fit_probes.py")
    text = json.loads(described.read_text(encoding="utf-8"))
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(weights).items()}
    layers = tuple((tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(len(tensors) // 2))
    return Probe(text["name"], tuple(text["classes"]), tuple(text["inputs"]), layers, text["details"])


def probe_features(
    images: np.ndarray,
    probes: Sequence[Probe],
    known: Mapping[str, np.ndarray] | None = None,
    cache_dir: Path | str | None = None,
) -> dict[str, np.ndarray]:
    """What the probes read off uint8 (N, H, W, 3) images, each extractor run once; `known` features are taken over."""
    features = dict(known or {})
    for probe in probes:
        for name in probe.inputs:
            if name not in features:
                features[name] = cached_features(INPUTS[name](), images, cache_dir)
    return features


def fit_probe(
    name: str,
    features: Mapping[str, np.ndarray],
    targets: Sequence[str | None],
    *,
    min_count: int = 20,
    hidden: int = 0,
    epochs: int = 10,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.3,
    seed: int = 0,
    details: Mapping[str, Any] | None = None,
) -> Probe:
    """Multinomial logistic regression (hidden = 0), or with one hidden layer, by AdamW on standardised features.

    Args:
        features: extractor name -> float32 (N, D), in the order the probe shall read them.
        targets: N class names; None and classes of fewer than `min_count` images are left out of the fit.
        dropout: of the input features (and the hidden layer): it regularises better here than weight decay alone.
    """
    counts: dict[str, int] = {}
    for target in targets:
        if target is not None:
            counts[target] = counts.get(target, 0) + 1
    classes = tuple(sorted(target for target, count in counts.items() if count >= min_count))
    if len(classes) < 2:
        raise InputError(f"the {name} probe needs at least 2 classes of {min_count} images, {len(classes)} found")
    index = {target: i for i, target in enumerate(classes)}
    rows = np.array([i for i, target in enumerate(targets) if target in index])
    y = torch.tensor([index[str(targets[i])] for i in rows])
    x = torch.from_numpy(np.concatenate([values[rows] for values in features.values()], axis=1))
    mean, std = x.mean(dim=0), x.std(dim=0)
    std = std + 0.1 * std.mean() + 1e-6  # a feature that hardly ever moves must not be blown up
    x = (x - mean) / std

    generator = torch.Generator().manual_seed(seed)
    sizes = [x.shape[1], *([hidden] if hidden else []), len(classes)]
    linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for linear in linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    batch = min(256, len(y))
    steps = epochs * (len(y) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator)
        for start in range(0, len(y) - batch + 1, batch):
            chosen = order[start : start + batch]
            value = x[chosen]
            for i, linear in enumerate(linears):
                value = torch.relu(value) if i else value
                kept = torch.rand(value.shape, generator=generator) >= dropout
                value = linear(value * kept / (1.0 - dropout))
            loss = F.cross_entropy(value, y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not bool(torch.isfinite(loss)):
        raise NumericalError(f"fitting the {name} probe diverged (loss {float(loss)}); lower learning_rate")

    layers = [(linear.weight.detach().double(), linear.bias.detach().double()) for linear in linears]
    weight, bias = layers[0]
    layers[0] = (weight / std, bias - (weight / std) @ mean.double())
    fitted = tuple((weight.float().numpy(), bias.float().numpy()) for weight, bias in layers)
    settings = {
        "images": len(rows), "min_count": min_count, "hidden": hidden, "epochs": epochs, "seed": seed,
        "learning_rate": learning_rate, "weight_decay": weight_decay, "dropout": dropout,
    }  # fmt: skip
    return Probe(name, classes, tuple(features), fitted, {**settings, **(details or {})})


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values` (N,), NaN left out (Efron 1979)."""
    kept = values[~np.isnan(values)]
    if len(kept) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.array([kept[rng.integers(0, len(kept), len(kept))].mean() for _ in range(resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
